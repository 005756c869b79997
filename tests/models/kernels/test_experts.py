"""The experts of a mixture: choosing them, and computing them together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cortex.models.kernels import cpu, reference
from cortex.models.mixture import MixtureShape, SparseMoe
from cortex.models.parallel import Cut
from cortex.models.quantization import DENSE, ExpertMatrix, Matrix, Part
from random_blocks import PACKED, columns_of, random_part

EXPERTS, PER_TOKEN = 6, 3


@dataclass(frozen=True)
class Mixture:
    """The matrices of some experts, and tokens with their choices."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix
    x: Tensor
    ids: Tensor
    weights: Tensor

    def by(self, kernels: cpu.CpuKernels, tokens: slice = slice(None)) -> Tensor:
        """Compute some of the tokens with *kernels*."""
        chosen = (self.x[tokens], self.ids[tokens], self.weights[tokens])
        return kernels.experts(*chosen, gate=self.gate, up=self.up, down=self.down)

    def by_reference(self) -> Tensor:
        """Compute all of them in plain torch."""
        matrices = {"gate": self.gate, "up": self.up, "down": self.down}
        return reference.experts(self.x, self.ids, self.weights, **matrices)

    def tiled(self, kernels: cpu.CpuKernels, *, but_for: str = "") -> Mixture:
        """Return it with quantised matrices in tiles."""
        matrices = {"gate": self.gate, "up": self.up, "down": self.down}
        for name, matrix in matrices.items():
            if name != but_for:
                matrices[name] = stack([kernels.tile(part) for part in matrix.parts], matrix)
        return Mixture(**matrices, x=self.x, ids=self.ids, weights=self.weights)


def stack(parts: list[Part], like: ExpertMatrix) -> ExpertMatrix:
    """Return an ExpertMatrix as *like*, of *parts*."""
    matrix = ExpertMatrix(like.experts, like.stacked[0], like.cut)
    matrix.fill(parts)
    return matrix


def experts_of(kind: str, rows: int, columns: int) -> ExpertMatrix:
    """Random matrices [rows, columns] of all experts."""
    matrix = ExpertMatrix(EXPERTS, Cut.whole(rows), Cut.whole(columns))
    matrix.fill([random_part(kind, EXPERTS * rows, columns)])
    return matrix


def mixture_of(
    kind: str, tokens: int, inner: int, hidden: int, *, gate: str | None = None
) -> Mixture:
    """Random matrices of a kind, and tokens that choose at random."""
    ids, weights = reference.route(torch.randn(tokens, EXPERTS), PER_TOKEN, is_normalised=True)
    return Mixture(
        experts_of(gate or kind, inner, hidden),
        experts_of(kind, inner, hidden),
        experts_of(kind, hidden, inner),
        torch.randn(tokens, hidden),
        ids,
        weights,
    )


def sizes_of(kind: str) -> tuple[int, int]:
    """Inner and hidden sizes of whole blocks and whole tiles."""
    return columns_of(kind, 1), columns_of(kind, 2)


@pytest.mark.parametrize("kind", cpu.KINDS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_agree(kernels: cpu.CpuKernels, kind: str, tokens: int) -> None:
    mixture = mixture_of(kind, tokens, *sizes_of(kind))

    found, expected = mixture.by(kernels), mixture.by_reference()

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", PACKED)
def test_experts_in_tiles_agree(kernels: cpu.CpuKernels, kind: str) -> None:
    mixture = mixture_of(kind, 20, *sizes_of(kind))

    found, expected = mixture.tiled(kernels).by(kernels), mixture.by_reference()

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("gate", ["F16", "Q4_K", "Q6_K", "FP8"])
def test_gates_may_be_of_another_type(kernels: cpu.CpuKernels, gate: str) -> None:
    mixture = mixture_of("Q8_0", 20, 32, 256, gate=gate)

    plain = mixture.by(kernels)
    tiled = mixture.tiled(kernels, but_for="gate" if gate in DENSE else "").by(kernels)

    expected = mixture.by_reference()
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(tiled, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("inner", "hidden"), [(19, 33), (1, 16), (16, 1), (17, 48)])
def test_experts_of_any_size_agree(kernels: cpu.CpuKernels, inner: int, hidden: int) -> None:
    mixture = mixture_of("F32", 20, inner, hidden)

    torch.testing.assert_close(mixture.by(kernels), mixture.by_reference(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q4_K", "Q8_0", "FP8"])
def test_what_a_token_gets_does_not_depend_on_its_company(
    kernels: cpu.CpuKernels, kind: str
) -> None:
    mixture = mixture_of(kind, 33, *sizes_of(kind))
    mixture = mixture if kind in DENSE else mixture.tiled(kernels)
    alone = torch.cat([mixture.by(kernels, slice(t, t + 1)) for t in range(33)])

    for tokens in (2, 7, 33):
        assert torch.equal(mixture.by(kernels, slice(tokens)), alone[:tokens])


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_number_of_threads_changes_no_bit(kernels: cpu.CpuKernels, kind: str) -> None:
    mixture = mixture_of(kind, 40, *sizes_of(kind))
    mixture = mixture if kind in DENSE else mixture.tiled(kernels)
    threads = torch.get_num_threads()

    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(mixture.by(kernels))
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(*results)


def test_an_expert_that_nobody_chose_is_not_read(kernels: cpu.CpuKernels) -> None:
    mixture = mixture_of("F32", 20, 16, 32)
    mixture.ids.copy_(torch.tensor([4, 1, 2]))
    expected = mixture.by(kernels)

    for matrix in (mixture.gate, mixture.up, mixture.down):
        rows = matrix.parts[0].data.view(EXPERTS, -1)
        rows[[0, 3, 5]] = 255  # no numbers

    assert torch.equal(mixture.by(kernels), expected)


def test_no_tokens_give_nothing(kernels: cpu.CpuKernels) -> None:
    assert mixture_of("F32", 0, 16, 32).by(kernels).shape == (0, 32)


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_an_expert_that_is_not_there_is_an_error(kernels: cpu.CpuKernels, expert: int) -> None:
    mixture = mixture_of("F32", 3, 16, 32)
    mixture.ids[1, 2] = expert

    with pytest.raises(IndexError, match="experts must be from 0 to 5"):
        mixture.by(kernels)


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 40])
@pytest.mark.parametrize("tokens", [1, 50])
def test_routing_agrees(
    kernels: cpu.CpuKernels, tokens: int, top_k: int, *, is_normalised: bool
) -> None:
    logits = torch.randn(tokens, 40) * 3

    ids, weights = kernels.route(logits, top_k, is_normalised=is_normalised)

    expected_ids, expected = reference.route(logits, top_k, is_normalised=is_normalised)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)
    assert not is_normalised or (weights.sum(-1) - 1).abs().max() < 1e-5


def test_of_equal_experts_the_first_are_chosen(kernels: cpu.CpuKernels) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])

    for route in (kernels.route, reference.route):
        assert route(logits, 4, is_normalised=False)[0].tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_whose_logits_are_no_numbers_is_still_routed(
    kernels: cpu.CpuKernels, value: float
) -> None:
    logits = torch.randn(3, 9)
    logits[1] = value

    ids, _ = kernels.route(logits, 4, is_normalised=True)

    assert all(sorted(set(row)) == sorted(row) for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < 9
    assert torch.equal(ids[0], reference.route(logits, 4, is_normalised=True)[0][0])


@pytest.mark.parametrize("rows", [1, 40])
def test_what_a_gate_lets_through_is_added(kernels: cpu.CpuKernels, rows: int) -> None:
    x, y, gate = torch.randn(rows, 33), torch.randn(rows, 33), torch.randn(rows, 1) * 5

    found = kernels.add_gated(x, y, gate)

    torch.testing.assert_close(found, x + gate.sigmoid() * y)
    torch.testing.assert_close(reference.add_gated(x, y, gate), x + gate.sigmoid() * y)


def test_a_shared_expert_is_added_to_the_chosen_ones() -> None:
    shape = MixtureShape(EXPERTS, PER_TOKEN, 16, is_normalised=True, shared_size=24)
    moe, x = SparseMoe(32, shape), torch.randn(5, 32)
    for child in moe.modules():
        if isinstance(child, Matrix):
            child.fill([random_part("F32", child.rows, child.columns)])

    y = moe(x)

    routed = moe.experts(x, *reference.route(moe.gate(x), PER_TOKEN, is_normalised=True))
    gate = moe.shared_expert_gate(x).sigmoid()
    torch.testing.assert_close(y, routed + gate * moe.shared_expert(x))
    assert gate.shape == (5, 1)


def test_older_cpus_compute_experts(
    kernels: cpu.CpuKernels, other_kernels: dict[str, cpu.CpuKernels]
) -> None:
    mixture = mixture_of("Q4_K", 20, 256, 256)
    expected, tiled = mixture.by_reference(), mixture.tiled(kernels)

    for other in other_kernels.values():
        found = tiled.by(other)
        close = 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=close)
