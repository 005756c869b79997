"""What the ranks do together cuts a recording: the same bits as operation by operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.kernels import cpu, ops, reference
from cortex.models.kernels.program import Program
from cortex.models.parallel import Cut, Group
from cortex.models.quantization import Matrix, Part
from rank_threads import on_ranks

VOCABULARY, SIZE = 12, 32


class Noting:
    """Collectives of a rank whose two peers hold the same; they note the shapes they see."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.seen.append(("sum", tuple(x.shape)))
        return x.mul_(3)

    def all_gather(self, x: Tensor) -> Tensor:
        self.seen.append(("gather", tuple(x.shape)))
        return x.repeat(1, 3)


@pytest.fixture
def kernels() -> cpu.CpuKernels:
    found = cpu.kernels()
    assert found is not None, "the tests need a C compiler"
    return found


def batch_of(tokens: int, sampled: int) -> Batch:
    numbers = torch.arange(tokens)
    return Batch(
        token_ids=numbers % VOCABULARY,
        positions=numbers,
        slots=numbers,
        query_starts=torch.tensor([0, tokens], dtype=torch.int32),
        context_tokens=torch.tensor([tokens], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        sampled=numbers[tokens - sampled :],
        cache=KVCache([], [], 16),
    )


def embedding(first: int, rows: int) -> tuple[Matrix, Cut]:
    torch.manual_seed(3)
    weights = torch.randn(VOCABULARY, SIZE)[first : first + rows].contiguous()
    cut = Cut(VOCABULARY, ((first, first + rows),))
    matrix = Matrix((cut,), Cut.whole(SIZE))
    matrix.fill([Part("F32", weights.view(torch.uint8))])
    return matrix, cut


def model_of(group: Group) -> object:
    """Sums of what ranks have of an embedding, and of it again; gathered logits."""
    matrix, cut = embedding(group.rank * VOCABULARY // group.ranks, VOCABULARY // group.ranks)

    def compute(batch: Batch) -> Tensor:
        x = ops.all_reduce(ops.rows_of_share(matrix, batch.token_ids, cut), group)
        y = ops.all_reduce(ops.add(x, x), group)
        rows = ops.take(ops.add(x, y), batch.sampled)
        return ops.all_gather(rows, group)

    return compute


def test_every_rank_runs_the_pieces_between_what_all_do(kernels: cpu.CpuKernels) -> None:
    whole, _ = embedding(0, VOCABULARY)

    def run(group: Group) -> list[Tensor]:
        program = Program(model_of(group), KVCache([], [], 16), kernels)  # type: ignore[arg-type] # a test's
        return [program(batch_of(*size)).clone() for size in ((5, 2), (9, 9), (1, 1), (5, 2))]

    for found in on_ranks(2, run):
        for logits, (tokens, sampled) in zip(found, ((5, 2), (9, 9), (1, 1), (5, 2)), strict=True):
            batch = batch_of(tokens, sampled)
            x = reference.rows(whole.parts[0], batch.token_ids)
            assert torch.equal(logits, (x + 2 * (x + x))[batch.sampled].repeat(1, 2))


def test_only_the_rows_that_a_step_has_are_brought_together(kernels: cpu.CpuKernels) -> None:
    noting = Noting()
    compute = model_of(Group(0, 3, noting))
    program = Program(compute, KVCache([], [], 16), kernels)  # type: ignore[arg-type] # a test's
    program(batch_of(9, 4))
    noting.seen.clear()

    logits = program(batch_of(3, 2))

    assert noting.seen == [("sum", (3, SIZE)), ("sum", (3, SIZE)), ("gather", (2, SIZE))]
    assert logits.shape == (2, 3 * SIZE)
    assert torch.equal(logits, compute(batch_of(3, 2)))  # type: ignore[operator] # a test's


def test_an_id_beyond_the_vocabulary_is_an_error_on_every_rank(kernels: cpu.CpuKernels) -> None:
    batch = batch_of(2, 1)
    batch.token_ids[1] = VOCABULARY

    for rank in range(2):
        compute = model_of(Group(rank, 2, Noting()))
        program = Program(compute, KVCache([], [], 16), kernels)  # type: ignore[arg-type] # a test's
        for call in (program, compute):
            with pytest.raises(IndexError):
                call(batch)  # type: ignore[operator] # a test's


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("is_tiled", [False, True])
def test_the_rows_of_a_share_are_those_of_the_reference(
    kernels: cpu.CpuKernels, kind: str, is_tiled: bool
) -> None:
    if kind == "F32" and is_tiled:
        pytest.skip("only quantised weights are tiled")
    torch.manual_seed(5)
    row_bytes = {"F32": 256, "Q8_0": 68, "Q4_1": 40}[kind]
    stored = torch.randint(0, 60, (20, row_bytes), dtype=torch.uint8)
    part = Part(kind, stored)
    ids = torch.tensor([3, 4, 23, 24, 39, 0])

    found = kernels.rows_of_share(kernels.tile(part) if is_tiled else part, ids, 4, 40)

    assert torch.equal(found, reference.rows_of_share(part, ids, 4, 40))
    assert not found[[0, 3, 4, 5]].any()
    assert found[[1, 2]].any()
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match="from 0 to 39"):
            kernels.rows_of_share(part, torch.tensor([wrong]), 4, 40)
