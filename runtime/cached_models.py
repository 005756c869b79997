"""What the files on this machine say of models that are not loaded.

Headers and tokenisers only, read in a thread; a tokeniser that was used is kept. A model without
files here is 404: no evidence is not the same as no capability.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from cortex.ipc.errors import ModelNotFound, Unloadable
from cortex.ipc.node_api import Capabilities, Limit, LoadRequest
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.sizes import context_tokens
from cortex.runtime.chat import ChatOptions
from cortex.runtime.model_files import find
from cortex.runtime.node import TextView
from cortex.runtime.places import Places
from cortex.runtime.text import TextSide

KEPT_TEXT_SIDES = 4


class CachedModels:
    """Models by what lies in the caches and, where *places* allow, elsewhere on the disk."""

    def __init__(
        self,
        places: Places,
        open_text: Callable[[Path, ChatOptions], TextView] = TextSide.from_checkpoint,
    ) -> None:
        self._places = places
        self._open_text = open_text
        self._text_sides: OrderedDict[Path, TextView] = OrderedDict()
        self._opening = asyncio.Lock()

    async def capabilities(self, model_id: str) -> Capabilities:
        """Return what headers and tokeniser say; raise ModelNotFound where there are none.

        It is what a load that settles nothing about its chats would make of them.
        """
        path = await asyncio.to_thread(self._path, model_id)
        try:
            checkpoint = await asyncio.to_thread(_supported, path)
        except (CheckpointError, OSError) as exc:
            raise ModelNotFound(f"the files of {model_id!r} cannot be served: {exc}") from exc
        text = await self.text_side(model_id)
        said = checkpoint.config.get("max_position_embeddings")
        context = context_tokens(checkpoint.config) if type(said) is int and said > 0 else None
        return Capabilities(
            capabilities=text.abilities,
            limit=Limit(context=context) if context else None,
            tool_call=text.takes_tools,
            reasoning=text.reasons,
            size_bytes=checkpoint.weights_bytes,
            source="cache",
        )

    async def text_side(self, model_id: str) -> TextView:
        """Return the tokeniser and template of a model; raise ModelNotFound where there is none."""
        path = await asyncio.to_thread(self._path, model_id)
        async with self._opening:  # whoever comes meanwhile finds it open
            if path not in self._text_sides:
                options = ChatOptions.of(LoadRequest(model_id))
                try:
                    text = await asyncio.to_thread(self._open_text, path, options)
                except (CheckpointError, Unloadable, OSError) as exc:
                    raise ModelNotFound(f"the files of {model_id!r} cannot be read: {exc}") from exc
                self._text_sides[path] = text
            self._text_sides.move_to_end(path)
            while len(self._text_sides) > KEPT_TEXT_SIDES:
                self._text_sides.popitem(last=False)
            return self._text_sides[path]

    def _path(self, model_id: str) -> Path:
        try:
            path = find(self._places, model_id)
        except Unloadable as exc:
            raise ModelNotFound(str(exc)) from exc
        if path is None:
            raise ModelNotFound(f"there are no files of {model_id!r} on this machine")
        return path


def _supported(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path)
    checkpoint.check_supported()
    return checkpoint
