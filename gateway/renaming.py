"""Clients meet a model under the name they asked for, whatever nodes call it.

A profile's ``source`` may be a private path (``file:/srv/models/x.gguf``), so it stays out of
answers, of streams and of the words of errors. Where a node uses the client's name too, everything
passes byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from cortex.gateway import sse
from cortex.ipc.errors import ApiError

FILE = "file:"


@dataclass(frozen=True)
class Renaming:
    """What nodes call *node_id* is *asked* to the client."""

    node_id: str
    asked: str

    @property
    def is_needed(self) -> bool:
        """Whether the names differ."""
        return self.node_id != self.asked

    @cached_property
    def _names(self) -> re.Pattern[str]:
        """The id where it stands alone; a path also where another follows below it."""
        if self.node_id.startswith(FILE):
            path = self.node_id.removeprefix(FILE).rstrip("/")
            return re.compile(f"(?:{FILE})?{re.escape(path)}")
        return re.compile(rf"(?<![\w/:.-]){re.escape(self.node_id)}(?![\w/:-]|\.\w)")

    def text(self, text: str) -> str:
        """Return *text*, words of a node, with the client's name in it."""
        return self._names.sub(lambda _: self.asked, text)

    def answer(self, body: bytes) -> bytes:
        """Return *body*, a whole answer or what an event carries; what is no object stays."""
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError:
            return body
        if not isinstance(data, dict):
            return body
        if "model" in data:
            data["model"] = self.asked
        if "error" in data:
            data["error"] = self._deep(data["error"])
        return orjson.dumps(data)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what the block raises with the client's name in its words."""
        try:
            yield
        except ApiError as error:
            if not self.is_needed:
                raise
            raise self._error(error) from error

    def _error(self, error: ApiError) -> ApiError:
        """Return a copy: several requests may have met the same failed load."""
        renamed = type(error).__new__(type(error), self.text(str(error)))
        vars(renamed).update(vars(error), extras=self._deep(error.extras))
        return renamed

    def _deep(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._deep(item) for item in value]
        if isinstance(value, dict):
            return {name: self._deep(item) for name, item in value.items()}
        return value


class RenamedStream:
    """Passes a stream on line by line; of those that carry an object the model is renamed."""

    error: ApiError | None = None

    def __init__(self, renaming: Renaming) -> None:
        self._renaming = renaming
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return the lines that *chunk* completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return b"".join(self._line(line) + b"\n" for line in lines)

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(sse.DATA + b"{"):
            return line
        return sse.DATA + self._renaming.answer(line.removeprefix(sse.DATA))
