"""The real model in a real device process: it comes beside streams, and leaves nothing behind."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from cortex.ipc.messages import SamplingParams
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.taps import Tap
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_conversation import Progress
from cortex.runtime.supervisor import Supervisor
from faulty_node import says
from forked import forking
from supervisor_fakes import FakeModelFiles

GREEDY = SamplingParams(temperature=0.0, max_tokens=400, seed=1)
BRIEF = msgspec.structs.replace(GREEDY, max_tokens=40)
A, B = "file:/a.gguf", "file:/b.gguf"
MIB = 2**20
A_FEW_BYTES = 16 * MIB


class OneFile(FakeModelFiles):
    """Every model is the same file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    async def fetch(self, request: LoadRequest, progress: Progress) -> Path:
        self.fetching.append(request.model_id)
        progress(1, 1)
        return self._path


@pytest.fixture(scope="module")
def prepared() -> Iterator[None]:
    with forking("cortex.runtime.preload"):
        yield


@pytest.fixture
async def node(prepared: None, embedded_model: Path) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(
        [DeviceSpec(0, "cpu:0", 2**30, 1)],
        files=OneFile(embedded_model),
        taps=Tap(None, "supervisor"),
    )
    async with supervisor:
        yield supervisor


def request(model_id: str) -> LoadRequest:
    return LoadRequest(model_id, max_context_tokens=512, max_sequences=2)


def private_bytes(node: Supervisor) -> int:
    """Return what the device process has written, and so holds for itself alone."""
    rollup = Path(f"/proc/{node.devices[0].pid}/smaps_rollup").read_text()
    [line] = [line for line in rollup.splitlines() if line.startswith("Private_Dirty:")]
    return int(line.split()[1]) * 1024


async def test_a_stream_goes_on_while_another_model_loads_on_its_device(node: Supervisor) -> None:
    await node.load(request(A))
    await node.loaded(A)
    stream = node.generate(A, [1, 2, 3], GREEDY)
    tokens = len(await anext(stream))
    seen: list[int] = []
    loading = await node.load(request(B))
    loading.report = lambda *_: seen.append(tokens)  # type: ignore[method-assign] # listened to
    while loading.limits is None:
        tokens += len(await anext(stream))
    seen.append(tokens)

    assert len(seen) > 2
    assert seen[-1] - seen[0] >= 3


async def test_unloading_gives_every_byte_back_every_time(node: Supervisor) -> None:
    async def come_and_go() -> None:
        await node.load(request(A))
        await node.loaded(A)
        held.append(private_bytes(node))
        assert (await says(node.generate(A, [1, 2, 3], BRIEF)))[1] is None
        await node.unload(A)
        left.append(private_bytes(node))

    held: list[int] = []
    left: list[int] = []
    for _ in range(6):  # the first one allocates what stays: threads, libraries' buffers
        await come_and_go()

    assert min(held) - left[0] > 50 * MIB
    assert [after for after in left[1:] if after > left[0] + A_FEW_BYTES] == []
