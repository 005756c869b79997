"""A communicator of one rank: that NCCL is found and called, captured and given up.

Between two devices it is another matter, which needs two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined] # torch's

from cortex.models.kernels.graphs import CudaCapture
from cortex.models.parallel import Group
from cortex.runtime.device import nccl
from cortex.runtime.device.nccl import NcclCollectives
from cortex.runtime.device.refusal import PeerLost

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = torch.device("cuda:0")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[NcclCollectives]:
    store = FileStore(str(tmp_path / "meeting"), 1)
    made = NcclCollectives.meeting(store, GPU, rank=0, ranks=1)
    yield made
    made.abort()


def test_the_library_that_torch_loaded_says_its_version() -> None:
    major, minor, _ = torch.cuda.nccl.version()  # type: ignore[no-untyped-call] # torch's

    assert nccl.version() // 100 == major * 100 + minor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_sum_over_one_rank_is_what_it_has(alone: NcclCollectives, dtype: torch.dtype) -> None:
    x = torch.arange(24, device=GPU).view(4, 6).to(dtype)

    found = alone.all_reduce(x)

    assert found.data_ptr() == x.data_ptr()
    assert found.tolist() == torch.arange(24).view(4, 6).tolist()


def test_the_columns_of_one_rank_are_its_own(alone: NcclCollectives) -> None:
    x = torch.randn(3, 5, device=GPU)

    assert torch.equal(alone.all_gather(x), x)


def test_collectives_are_captured_with_the_step_that_they_belong_to(
    alone: NcclCollectives,
) -> None:
    group = Group(0, 1, alone)
    assert group.collectives is alone
    x = torch.ones(8, 16, device=GPU)

    graph = CudaCapture(GPU)(lambda: alone.all_gather(alone.all_reduce(x * 2)) + 1)
    x.fill_(5)
    graph.replay()

    assert torch.equal(graph.logits, torch.full_like(x, 11.0))


def test_an_aborted_communicator_refuses_in_words_and_leaves_the_device_well(
    alone: NcclCollectives,
) -> None:
    x = torch.ones(8, device=GPU)
    alone.all_reduce(x)

    alone.abort()
    alone.abort()

    with pytest.raises(PeerLost, match="ncclAllReduce failed"):
        alone.all_reduce(x)
    assert x.sum().item() == 8


def test_a_healthy_communicator_passes_its_check(alone: NcclCollectives) -> None:
    alone.all_reduce(torch.ones(1 << 20, device=GPU))

    alone.check()
