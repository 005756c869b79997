"""Weights that are looked at without being fetched: their headers, by HTTP range.

A stand-in is a file as long as the real one that holds its beginning and then nothing (a hole,
which takes no room). Whoever reads headers from disk reads them from stand-ins too, so what a hub
has is judged by the code that judges what lies here.

    safetensors   the first 256 KiB, and the rest of a longer header
    GGUF          1 MiB, four times as much until the header is whole: the vocabulary is in it
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cortex.ipc.downloads import RepoFile
from cortex.ipc.errors import Unloadable
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import MAX_HEADER_BYTES, GGUFFile
from cortex.models.checkpoints.json import MAX_FILE_BYTES, parse_object
from cortex.models.checkpoints.shards import INDEX
from cortex.runtime.hub_client import HubClient
from cortex.runtime.hub_files import (
    HubSource,
    Listing,
    dense_weights,
    describing,
    files_named,
    gguf_file,
    is_in_situ,
    quants,
    shards,
)

SAFETENSORS_BYTES = 2**18
MAX_SAFETENSORS_HEADER_BYTES = 2**26
GGUF_BYTES = 2**20
PARALLEL_HEADERS = 8
JUDGED_BY = ("config.json", "generation_config.json")


class RemoteModel:
    """The files of one commit that a load with *quant* needs; see ``look``."""

    def __init__(
        self, source: HubSource, commit: str, files: list[RepoFile], quants: Sequence[str] = ()
    ) -> None:
        self.source = source
        self.commit = commit
        self.files = files
        self.quants = quants
        """Those of the GGUF files beside them."""

    @property
    def gguf(self) -> RepoFile | None:
        """The one file, where it is a GGUF."""
        return self.files[0] if self.files[0].path.endswith(".gguf") else None

    @property
    def size_bytes(self) -> int:
        """Of everything that has to be in the cache."""
        return sum(file.size_bytes for file in self.files)


async def look(
    client: HubClient, source: HubSource, listing: Listing, quant: str | None
) -> RemoteModel:
    """Return which files are needed; raise Unloadable. Of the files only an index is fetched."""
    if quant is not None and not is_in_situ(listing, quant):
        file = gguf_file(source, listing, quant)
        return RemoteModel(source, listing.commit, [file], quants(listing))
    weights = dense_weights(source, listing)
    files = describing(listing)
    if weights.path == INDEX:
        data = await client.read(source, listing.commit, weights, MAX_FILE_BYTES)
        index = _parsed(data, f"{source}: {INDEX}")
        files += files_named(source, listing, shards(str(source), index))
    return RemoteModel(source, listing.commit, [*files, weights], quants(listing))


async def read_headers(client: HubClient, model: RemoteModel) -> Checkpoint:
    """Return the checkpoint that *model* would be; raise Unloadable."""
    with tempfile.TemporaryDirectory(prefix="cortex-headers-") as name:
        directory = Path(name)
        try:
            if model.gguf is not None:
                return await _gguf(client, model, model.gguf, directory)
            return await _safetensors(client, model, directory)
        except CheckpointError as exc:
            words = str(exc).replace(f"{directory}/", f"{model.source}: ")
            words = words.replace(str(directory), str(model.source))
            raise Unloadable(words, kind="corrupt_checkpoint") from exc
        except OSError as exc:
            raise Unloadable(
                f"the headers of {model.source} could not be written: {exc.strerror}",
                kind="fetch_failed",
            ) from exc


async def _gguf(
    client: HubClient, model: RemoteModel, file: RepoFile, directory: Path
) -> Checkpoint:
    stand_in = directory / file.path.rpartition("/")[2]
    held, count = b"", GGUF_BYTES
    while True:
        held += await _between(client, model, file, len(held), count)
        await asyncio.to_thread(_write, stand_in, held, file.size_bytes)
        is_all = count >= min(file.size_bytes, MAX_HEADER_BYTES)
        try:
            header = await asyncio.to_thread(GGUFFile.open, stand_in)
        except CheckpointError:
            if is_all:
                raise
        else:
            if is_all or _header_ends(header) <= len(held):
                return await asyncio.to_thread(Checkpoint.open, stand_in)
        count *= 4


def _header_ends(header: GGUFFile) -> int:
    """Return where the first tensor begins: no header goes on behind it."""
    return min((tensor.offset for tensor in header.tensors.values()), default=0)


async def _safetensors(client: HubClient, model: RemoteModel, directory: Path) -> Checkpoint:
    places = asyncio.Semaphore(PARALLEL_HEADERS)

    async def stand_in(file: RepoFile) -> None:
        async with places:
            held = await _between(client, model, file, 0, _first_bytes(file))
            if file.path.endswith(".safetensors"):
                ends = 8 + int.from_bytes(held[:8], "little")
                if len(held) < ends <= MAX_SAFETENSORS_HEADER_BYTES:
                    held += await _between(client, model, file, len(held), ends)
            await asyncio.to_thread(_write, directory / file.path, held, file.size_bytes)

    judged = [
        file
        for file in model.files
        if file.path in {*JUDGED_BY, INDEX} or file.path.endswith(".safetensors")
    ]
    try:
        async with asyncio.TaskGroup() as tasks:
            for file in judged:
                tasks.create_task(stand_in(file))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return await asyncio.to_thread(Checkpoint.open, directory)


def _first_bytes(file: RepoFile) -> int:
    return SAFETENSORS_BYTES if file.path.endswith(".safetensors") else MAX_FILE_BYTES


async def _between(
    client: HubClient, model: RemoteModel, file: RepoFile, start: int, stop: int
) -> bytes:
    data = bytearray()
    stop = min(stop, file.size_bytes)
    async for chunk in client.chunks(model.source, model.commit, file, start, stop):
        data += chunk
    return bytes(data)


def _write(path: Path, held: bytes, size_bytes: int) -> None:
    with path.open("wb") as out:
        out.write(held)
        out.truncate(size_bytes)


def _parsed(data: bytes, what: str) -> dict[str, object]:
    try:
        return parse_object(data, what)
    except CheckpointError as exc:
        raise Unloadable(str(exc), kind="corrupt_checkpoint") from exc
