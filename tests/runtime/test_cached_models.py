"""Models that are only on the disk; the routes' tests have the rest."""

import asyncio
from pathlib import Path

from cortex.ipc.downloads import HubAccess
from cortex.runtime.cached_models import CachedModels
from cortex.runtime.chat import ChatOptions
from cortex.runtime.hub import HubSettings
from cortex.runtime.places import Places
from cortex.runtime.text import TextSide
from fake_node import tiny_text


async def test_a_tokeniser_that_many_ask_for_at_once_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    opened: list[Path] = []

    def open_text(path: Path, _options: ChatOptions) -> TextSide:
        opened.append(path)
        return tiny_text()

    hub = HubSettings(HubAccess("http://127.0.0.1:1"), tmp_path)
    cached = CachedModels(Places(tmp_path, None, hub), open_text)
    await asyncio.gather(*(cached.text_side(f"file:{file}") for _ in range(5)))

    assert opened == [file]
