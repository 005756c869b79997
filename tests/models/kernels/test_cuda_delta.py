"""Which kernel serves which operation of a hybrid on a GPU, without one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import delta_cases
from cortex.models.kernels import cuda, cuda_delta, reference_delta
from cortex.models.kernels.cuda_delta import DELTA_OPERATIONS, by_fla, difference_in_trial
from cortex.models.kernels.reference_delta import DeltaHeads, Tokens

CPU = torch.device("cpu")


def fake_fla(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, **rest: Any
) -> tuple[Tensor, Tensor]:
    """Compute what fla's chunk_gated_delta_rule says it computes, for sequences end to end."""
    assert rest["output_final_state"]
    starts, states = rest["cu_seqlens"].tolist(), rest["initial_state"]
    tokens = Tokens(*(x[0].float() for x in (q * rest["scale"], k, v, g, beta)))
    outputs, after = [], []
    for index, state in enumerate(states):
        here = Tokens(*(x[starts[index] : starts[index + 1]] for x in tokens))
        out, end = reference_delta.recurrent_delta_rule(here, state)
        outputs.append(out)
        after.append(end)
    return torch.cat(outputs)[None].to(q.dtype), torch.stack(after)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Chooses, with fla's function as it is given or absent, on a GPU that is a CPU."""
    cuda_delta.fla_rule.cache_clear()
    trial = difference_in_trial
    monkeypatch.setattr(cuda_delta, "difference_in_trial", lambda rule, _: trial(rule, CPU))
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: torch.ones(shape) * 0)

    def choose(chunk: Any) -> Any:
        module = SimpleNamespace(chunk_gated_delta_rule=chunk) if chunk else None
        monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
        return cuda_delta.fla_rule()

    yield choose
    cuda_delta.fla_rule.cache_clear()


def test_fla_computes_the_rule_with_our_states() -> None:
    heads = DeltaHeads(2, 6, 16, 8, is_tiled=True)

    differences = delta_cases.rule_differences(
        by_fla(fake_fla), "random", [(0, 70), (3, 9), (64, 1)], heads
    )

    assert max(differences) < 5e-5


def test_what_a_slot_held_before_is_nothing_to_a_sequence_that_begins() -> None:
    heads = DeltaHeads(2, 2, 16, 8)
    batch = delta_cases.step([(0, 70)])
    qkv, ba = delta_cases.adversarial("random", 70, heads)
    rate, bias = delta_cases.parameters(heads)
    states = torch.full((delta_cases.SLOTS, 2, 16, 8), torch.nan)

    out = by_fla(fake_fla)(qkv, ba, rate, bias, states=states, heads=heads, batch=batch)

    assert bool(out.isfinite().all())


def test_fla_serves_where_it_is_right(chosen: Callable[[Any], Any]) -> None:
    assert chosen(fake_fla) is not None


def test_fla_that_is_not_installed_is_not_spoken_of(
    chosen: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen(None) is None

    assert not caplog.records


def _wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out, after = fake_fla(*args, **kwargs)
    return out * 1.1, after


def _forgetful(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out, after = fake_fla(*args, **kwargs)
    return out, torch.full_like(after, torch.nan)


def _broken(*_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("chunk", "said"),
    [(_wrong, "wrong"), (_forgetful, "wrong"), (_broken, "RuntimeError: no kernel image")],
)
def test_fla_that_fails_its_trial_is_left_with_a_warning(
    chosen: Callable[[Any], Any], chunk: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen(chunk) is None

    (record,) = caplog.records
    assert said in record.getMessage()


@pytest.mark.parametrize("operation", sorted(DELTA_OPERATIONS))
def test_any_operation_can_be_given_back_to_the_reference(operation: str) -> None:
    kernels = cuda.CudaKernels(object(), frozenset({operation}))
    others = cuda.CudaKernels(object())

    assert kernels._module(operation) is reference_delta
    assert others._module(operation).__name__.endswith(DELTA_OPERATIONS[operation])
    assert cuda.CudaKernels(None)._module(operation) is reference_delta
    assert operation in cuda.TRITON_OPERATIONS


def test_prompts_go_by_chunks_and_few_tokens_one_by_one() -> None:
    from cortex.models.kernels.triton_gated_delta import has_chunks

    few, many = delta_cases.step([(5, 8), (0, 1)]), delta_cases.step([(5, 16), (0, 1)])
    invariant = delta_cases.step([(5, 16), (0, 1)], is_batch_invariant=True)

    assert not has_chunks(few.positions, few)
    assert has_chunks(many.positions, many)
    assert not has_chunks(invariant.positions, invariant)


def test_the_reference_refuses_to_spoil_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = delta_cases.step([(5, 1)])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(state_slots=SimpleNamespace(is_cuda=True))

    assert list(reference_delta._sequences(batch))
    with pytest.raises(RuntimeError, match="asks the device for lengths"):
        list(reference_delta._sequences(on_gpu))  # type: ignore[arg-type] # as much of it as is looked at
