"""The gated delta rule and what belongs to it: by plain torch, by C, by Triton interpreted.

The inputs are those that have broken delta rules (``delta_cases``); the truth is the rule token by
token in float64.
"""

from __future__ import annotations

import pytest
import torch

import delta_cases
from cortex.models.kernels import cpu, reference_delta
from cortex.models.kernels.reference_delta import DeltaHeads
from delta_cases import INPUTS, SLOTS, adversarial, parameters, step, tokens_of
from interpreted import Interpreted

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200, 257)
HEADS = DeltaHeads(2, 4, 16, 16)
ODD = DeltaHeads(3, 9, 10, 20)
TILED = DeltaHeads(2, 6, 16, 40, is_tiled=True)
WIDE = DeltaHeads(1, 2, 70, 80)
RAGGED = [(0, 5), (7, 1), (0, 65), (64, 130), (3, 64)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLACES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""A unit of the last place, of numbers up to 1."""


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", INPUTS)
def test_chunks_compute_what_tokens_one_by_one_do(kind: str, length: int) -> None:
    torch.manual_seed(length)
    tokens, state = tokens_of(kind, length, HEADS), torch.randn(4, 16, 16)

    found = reference_delta.chunk_delta_rule(tokens, state)

    exact = delta_cases.exact_delta_rule(tokens, state)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", INPUTS)
def test_a_state_is_carried_over_any_cut(kind: str) -> None:
    tokens, state = tokens_of(kind, 150, HEADS), torch.randn(4, 16, 16)
    whole, end = reference_delta.chunk_delta_rule(tokens, state)

    for cut in (1, 63, 64, 65, 149):
        first, between = reference_delta.chunk_delta_rule(
            type(tokens)(*(x[:cut] for x in tokens)), state
        )
        second, after = reference_delta.chunk_delta_rule(
            type(tokens)(*(x[cut:] for x in tokens)), between
        )

        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(after, end, rtol=1e-4, atol=2e-5)


def test_the_shortcut_that_is_not_taken_is_wrong_where_keys_repeat() -> None:
    below = torch.ones(64, 64).tril(-1)  # keys all alike, nothing fades, beta 1
    one = torch.eye(64)
    product, power = one - below, below @ below
    while power.any():
        product, power = product @ (one + power), power @ power

    error = (product @ (one + below) - one).abs().max()

    solved = reference_delta._solve(below[None], one[None])[0]
    assert torch.equal(solved @ (one + below), one)
    assert error > 1000


def test_a_token_is_convolved_as_a_chunk_of_one() -> None:
    x, weight, before = torch.randn(5, 6), torch.randn(6, 4), torch.randn(5, 6, 3)

    together, kept = reference_delta.convolve_token(x, weight, before)

    for s in range(5):
        y, after = reference_delta.convolve_chunk(x[s : s + 1], weight, before[s])
        torch.testing.assert_close(together[s], y[0])
        assert torch.equal(kept[s], after)


# ---- C ----


@pytest.mark.parametrize("heads", [HEADS, ODD, TILED, WIDE])
@pytest.mark.parametrize("kind", INPUTS)
def test_c_agrees(kernels: cpu.CpuKernels, kind: str, heads: DeltaHeads) -> None:
    outputs, states = delta_cases.rule_differences(kernels.gated_delta_rule, kind, RAGGED, heads)

    assert outputs < 5e-5
    assert states < 5e-5


@pytest.mark.parametrize("kind", INPUTS)
def test_c_agrees_on_older_cpus(other_kernels: dict[str, cpu.CpuKernels], kind: str) -> None:
    for kernels in other_kernels.values():
        rule = delta_cases.rule_differences(kernels.gated_delta_rule, kind, [(0, 9), (3, 1)], ODD)
        convolution = delta_cases.convolution_differences(kernels.causal_convolution, RAGGED, 21, 4)
        assert max(*rule, *convolution) < 5e-5


@pytest.mark.parametrize(("channels", "kernel"), [(64, 4), (150, 4), (7, 2), (33, 3), (16, 16)])
def test_c_convolves(kernels: cpu.CpuKernels, channels: int, kernel: int) -> None:
    outputs, kept = delta_cases.convolution_differences(
        kernels.causal_convolution, RAGGED, channels, kernel
    )

    assert outputs < 2e-5
    assert kept == 0


def test_c_opens_and_closes_gates(kernels: cpu.CpuKernels) -> None:
    norm, product = delta_cases.gate_differences(kernels, torch.float32)

    assert norm < 1e-5
    assert product < 1e-6


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("heads", [HEADS, ODD, TILED])
def test_bits_depend_on_no_other_sequence_cut_or_thread(
    kernels: cpu.CpuKernels, heads: DeltaHeads, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, ba = adversarial("random", 40, heads)
    rate, bias = parameters(heads)
    states = torch.zeros(SLOTS, heads.values, heads.key_dim, heads.value_dim)

    def compute(lengths: delta_cases.Lengths, rows: list[int]) -> torch.Tensor:
        return kernels.gated_delta_rule(
            qkv[rows], ba[rows], rate, bias, states=states, heads=heads, batch=step(lengths)
        )

    whole = compute([(0, 40)], list(range(40)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pieces = [
        compute([(0, 1), (0, 3)], [0, 7, 8, 9])[:1],
        compute([(1, 17), (4, 2)], [*range(1, 18), 5, 6])[:17],
        *(compute([(t, 1)], [t]) for t in range(18, 22)),
        compute([(22, 18)], list(range(22, 40))),
    ]

    assert torch.equal(torch.cat(pieces), whole)


def test_a_sequence_that_begins_finds_zeros_whatever_lies_in_its_slot(
    kernels: cpu.CpuKernels,
) -> None:
    qkv, ba = adversarial("random", 4, HEADS)
    rate, bias = parameters(HEADS)
    outputs = []

    for rubbish in (0.0, torch.nan):
        states = torch.full((SLOTS, 4, 16, 16), rubbish)
        kept = torch.full((SLOTS, HEADS.channels, 3), rubbish)
        batch = step([(0, 4)])
        for operations in (kernels, reference_delta):
            x = operations.causal_convolution(qkv, torch.ones(HEADS.channels, 4), kept, batch)
            out = operations.gated_delta_rule(
                x, ba, rate, bias, states=states, heads=HEADS, batch=batch
            )
            outputs.append(out)

    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


# ---- Triton ----


@pytest.mark.parametrize(
    ("name", "heads", "lengths"),
    [
        ("recurrent_delta_rule", DeltaHeads(2, 4, 10, 40), [(0, 3), (7, 1)]),
        ("recurrent_delta_rule", DeltaHeads(2, 4, 16, 8, is_tiled=True), [(5, 2)]),
        ("chunk_delta_rule", DeltaHeads(2, 4, 10, 20), [(7, 65), (0, 2)]),
        ("chunk_delta_rule", DeltaHeads(2, 4, 16, 8, is_tiled=True), [(0, 64)]),
        ("chunk_delta_rule", DeltaHeads(1, 1, 70, 80), [(0, 66), (3, 5)]),
    ],
)
def test_triton_agrees(
    interpreted: Interpreted, name: str, heads: DeltaHeads, lengths: delta_cases.Lengths
) -> None:
    outputs, states = interpreted(
        delta_cases.triton_rule_differences, name, "random", lengths, heads
    )

    assert outputs < 5e-5
    assert states < 5e-5


@pytest.mark.parametrize("kind", INPUTS[1:])
def test_triton_agrees_where_rules_have_gone_wrong(interpreted: Interpreted, kind: str) -> None:
    heads, lengths = DeltaHeads(1, 1, 16, 16), [(3, 65)]

    outputs, states = interpreted(
        delta_cases.triton_rule_differences, "chunk_delta_rule", kind, lengths, heads
    )

    assert outputs < 5e-5
    assert states < 5e-5


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["recurrent_delta_rule", "chunk_delta_rule"])
def test_triton_takes_16_bits(interpreted: Interpreted, name: str, dtype: torch.dtype) -> None:
    heads = DeltaHeads(1, 1, 16, 16)

    outputs, states = interpreted(
        delta_cases.triton_rule_differences, name, "random", [(2, 5)], heads, dtype=dtype
    )

    assert outputs < 4 * PLACES[dtype]
    assert states < 5e-5


def test_triton_gives_the_same_bits_in_any_company(interpreted: Interpreted) -> None:
    assert interpreted(delta_cases.is_same_rule_alone, [(0, 9), (5, 2)], DeltaHeads(1, 1, 16, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "channels", "kernel"),
    [([(0, 2), (5, 3)], 260, 4), ([(0, 1), (5, 1), (1, 1)], 260, 4), ([(0, 3), (2, 1)], 7, 2)],
)
def test_triton_convolves(
    interpreted: Interpreted,
    lengths: delta_cases.Lengths,
    channels: int,
    kernel: int,
    dtype: torch.dtype,
) -> None:
    outputs, kept = interpreted(
        delta_cases.triton_convolution_differences,
        *(lengths, channels, kernel, torch.empty(0, dtype=dtype)),
    )

    assert outputs < 16 * PLACES[dtype]
    assert kept == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_opens_and_closes_gates(interpreted: Interpreted, dtype: torch.dtype) -> None:
    norm, product = interpreted(delta_cases.triton_gate_differences, dtype)

    assert norm < 64 * PLACES[dtype]
    assert product < 8 * PLACES[dtype]
