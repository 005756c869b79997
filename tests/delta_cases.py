"""Inputs that a delta rule may go wrong on, and what kernels make of them, told in numbers.

Called in the tests' own process, in that of ``interpreted``, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.execution import Execution
from cortex.models.kernels import reference_delta
from cortex.models.kernels.reference_delta import DeltaHeads, Tokens
from triton_cases import difference

Lengths = Sequence[tuple[int, int]]
"""Per sequence the tokens cached before, and the new ones."""

SLOTS = 7
FLOAT = torch.empty(0)
INPUTS = ("random", "repeated", "correlated", "one key", "forgetful", "mixed fades", "no fade")


def step(lengths: Lengths, device: str = "cpu", *, is_batch_invariant: bool = False) -> Batch:
    """Return a step of sequences whose states lie in scattered slots."""
    positions = [before + at for before, new in lengths for at in range(new)]
    starts = [sum(new for _, new in lengths[:at]) for at in range(len(lengths) + 1)]

    def integers(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        token_ids=integers(positions),
        positions=integers(positions),
        slots=integers(positions),
        query_starts=integers(starts, torch.int32),
        context_tokens=integers([sum(both) for both in lengths], torch.int32),
        block_tables=integers([[0]] * len(lengths), torch.int32),
        sampled=integers(positions),
        cache=KVCache([], [], 16, execution=Execution(is_batch_invariant=is_batch_invariant)),
        state_slots=integers([(5 * at + 3) % SLOTS for at in range(len(lengths))]),
    )


def adversarial(kind: str, tokens: int, heads: DeltaHeads) -> tuple[Tensor, Tensor]:
    """Return [q | k | v] and [b | a] of *tokens* tokens that are of a *kind*."""
    keys = heads.keys * heads.key_dim
    qkv = torch.randn(tokens, heads.channels)
    b, a = torch.randn(2, tokens, heads.values)
    k = qkv[:, keys : 2 * keys]
    match kind:
        case "repeated":  # a prompt of "!!!"
            qkv[:], b[:], a[:] = qkv[:1].clone(), 20.0, -30.0
        case "correlated":
            k += 30 * torch.randn(1, keys)
            b[:] = 8.0
        case "one key":
            k[:], b[:], a[:] = k[:1].clone(), 40.0, -60.0
        case "forgetful":
            a[:] = 300.0
        case "mixed fades":  # each of a few tokens forgets all, those between nothing
            a[:] = torch.where(torch.rand(tokens, 1) < 0.1, 2000.0, -8.0)
            b[:] = 5.0
        case "no fade":
            a[:] = -100.0
        case _:
            assert kind == "random"
    return qkv, torch.cat([b, a], dim=1)


def parameters(heads: DeltaHeads) -> tuple[Tensor, Tensor]:
    """Return a rate and a bias."""
    return -16 * torch.rand(heads.values), torch.randn(heads.values)


def tokens_of(kind: str, tokens: int, heads: DeltaHeads) -> Tokens:
    """Return the same as the rules of ``reference_delta`` take it."""
    qkv, ba = adversarial(kind, tokens, heads)
    return Tokens(
        *reference_delta.split_heads(qkv, heads), *reference_delta.gates(ba, *parameters(heads))
    )


def exact_delta_rule(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule token by token in float64."""
    doubles = Tokens(*(x.double() for x in tokens))
    out, after = reference_delta.recurrent_delta_rule(doubles, state.double())
    return out.float(), after.float()


def rule_differences(
    rule: Callable[..., Tensor],
    kind: str,
    lengths: Lengths,
    heads: DeltaHeads,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[float, float]:
    """Differ in outputs and states from the reference; slots of no sequence must stay."""
    torch.manual_seed(3)
    batch = step(lengths, device)
    qkv, ba = (x.to(device, dtype) for x in adversarial(kind, len(batch.positions), heads))
    rate, bias = (x.to(device) for x in parameters(heads))
    states = torch.randn(SLOTS, heads.values, heads.key_dim, heads.value_dim).to(device)
    expected_states = states.clone()

    out = rule(qkv, ba, rate, bias, states=states, heads=heads, batch=batch)

    expected = reference_delta.gated_delta_rule(
        qkv, ba, rate, bias, states=expected_states, heads=heads, batch=batch
    )
    assert out.dtype == dtype
    return difference(out, expected), difference(states, expected_states)


def triton_rule_differences(name: str, *args: object, **kwargs: object) -> tuple[float, float]:
    """Differ from the reference, by a function of ``triton_gated_delta``."""
    from cortex.models.kernels import triton_gated_delta

    return rule_differences(getattr(triton_gated_delta, name), *args, **kwargs)  # type: ignore[arg-type] # as the test has them


def convolution_differences(
    convolve: Callable[..., Tensor],
    lengths: Lengths,
    channels: int,
    kernel: int,
    like: Tensor = FLOAT,
) -> tuple[float, float]:
    """Differ in outputs and in what is kept, with inputs, *like* that, whose rows lie apart."""
    torch.manual_seed(3)
    batch = step(lengths, str(like.device))
    x = torch.randn(len(batch.positions), channels + 5).to(like)[:, :channels]
    weight = torch.randn(channels, kernel).to(like.device)
    kept = torch.randn(SLOTS, channels, kernel - 1).to(like.device)
    expected_kept = kept.clone()

    y = convolve(x, weight, kept, batch)

    expected = reference_delta.causal_convolution(x, weight, expected_kept, batch)
    assert y.dtype == like.dtype
    return difference(y, expected), difference(kept, expected_kept)


def triton_convolution_differences(*args: object) -> tuple[float, float]:
    """The same by Triton's kernel."""
    from cortex.models.kernels import triton_convolution

    return convolution_differences(triton_convolution.causal_convolution, *args)  # type: ignore[arg-type] # as the test has them


def gate_differences(
    kernels: object, dtype: torch.dtype, device: str = "cpu"
) -> tuple[float, float]:
    """Of the gated norm and the sigmoid, with gates whose rows lie apart."""
    torch.manual_seed(3)
    x, weight = torch.randn(5, 3, 20).to(device, dtype), torch.rand(20).to(device)
    gate = 9 * torch.randn(5, 64).to(device, dtype)[:, 2:62]
    found = [
        kernels.gated_rms_norm(x, gate, weight, 1e-6),  # type: ignore[attr-defined] # a module, or an object
        kernels.sigmoid_multiply(x.flatten(1), gate),  # type: ignore[attr-defined] # the same
    ]

    norm = difference(found[0], reference_delta.gated_rms_norm(x, gate, weight, 1e-6))
    product = difference(found[1], reference_delta.sigmoid_multiply(x.flatten(1), gate))
    assert [y.dtype for y in found] == [dtype, dtype]
    return norm, product


def triton_gate_differences(dtype: torch.dtype) -> tuple[float, float]:
    """The same by Triton's kernels."""
    from cortex.models.kernels import triton_gates

    return gate_differences(triton_gates, dtype)


def is_same_rule_alone(lengths: Lengths, heads: DeltaHeads) -> bool:
    """Whether, where bits shall not depend on the batch, they do not; also not on chunks."""
    from cortex.models.kernels import triton_gated_delta

    torch.manual_seed(3)
    qkv, ba = adversarial("random", sum(new for _, new in lengths), heads)
    rate, bias = parameters(heads)
    states = torch.randn(SLOTS, heads.values, heads.key_dim, heads.value_dim)
    rows = [sum(new for _, new in lengths[:at]) for at in range(len(lengths) + 1)]

    def compute(some: Lengths, first: int, into: Tensor) -> Tensor:
        batch = step(some, is_batch_invariant=True)
        tokens = slice(first, first + len(batch.positions))
        return triton_gated_delta.gated_delta_rule(
            qkv[tokens], ba[tokens], rate, bias, states=into, heads=heads, batch=batch
        )

    together = compute(lengths, 0, states.clone())
    for at, (before, new) in enumerate(lengths):
        alone = states.roll((3 - (5 * at + 3)) % SLOTS, 0)
        half = new // 2
        pieces = [
            compute([(before, half)], rows[at], alone),
            compute([(before + half, new - half)], rows[at] + half, alone),
        ]
        if not torch.equal(torch.cat(pieces), together[rows[at] : rows[at + 1]]):
            return False
    return True
