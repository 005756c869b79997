"""The gated delta rule as the device computes it, on what has broken others, and graphs of it."""

from __future__ import annotations

import pytest
import torch
from random_models import SHAPES, random_model
from torch import Tensor

import delta_cases
from cortex.ipc.messages import SamplingParams
from cortex.models.execution import Execution
from cortex.models.kernels import cuda
from cortex.models.kernels.reference_delta import DeltaHeads
from cortex.models.loaded_model import LoadedModel
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from delta_cases import INPUTS, Lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = torch.device("cuda:0")
LARGE = DeltaHeads(16, 48, 128, 128)
TILED = DeltaHeads(2, 6, 64, 96, is_tiled=True)
STEPS: tuple[Lengths, ...] = (
    [(0, 1), (9, 1), (300, 1)],
    [(0, 5), (7, 1), (0, 65), (64, 130), (3, 64)],
    [(0, 257)],
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
SHAPE = {
    **SHAPES["27b"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "vocab_size": 1000,
}
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rule", ["recurrent_delta_rule", "chunk_delta_rule"])
@pytest.mark.parametrize("heads", [LARGE, TILED], ids=["large", "tiled"])
def test_the_rule_agrees(heads: DeltaHeads, rule: str, dtype: torch.dtype) -> None:
    for kind in INPUTS:
        for lengths in STEPS:
            differences = delta_cases.triton_rule_differences(
                rule, kind, lengths, heads, dtype=dtype, device="cuda"
            )
            assert max(differences) < TOLERANCES[dtype], (kind, lengths)


@pytest.mark.parametrize("kind", INPUTS)
def test_what_serves_agrees(kind: str) -> None:
    for lengths in STEPS:
        differences = delta_cases.rule_differences(
            cuda.kernels().gated_delta_rule,
            kind,
            lengths,
            LARGE,
            dtype=torch.bfloat16,
            device="cuda",
        )
        assert max(differences) < TOLERANCES[torch.bfloat16], lengths


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", STEPS)
def test_the_convolution_agrees(lengths: Lengths, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype, device=GPU)

    y, kept = delta_cases.triton_convolution_differences(lengths, 1000, 4, like)

    assert y < TOLERANCES[dtype]
    assert kept == 0


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_gates_agree(dtype: torch.dtype) -> None:
    from cortex.models.kernels import triton_gates

    assert max(delta_cases.gate_differences(triton_gates, dtype, "cuda")) < TOLERANCES[dtype]


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_a_hybrids_captured_steps_compute_what_the_model_does(*, is_batch_invariant: bool) -> None:
    torch.manual_seed(0)
    execution = Execution(is_batch_invariant=is_batch_invariant)
    model = random_model(SHAPE, GPU, torch.float32, execution)

    graphs, plain = (logits(model, is_recorded=is_recorded) for is_recorded in (True, False))

    for found, expected in zip(graphs, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def logits(model: LoadedModel, *, is_recorded: bool) -> list[Tensor]:
    """Return those [S, V] of two prompts, and of some single tokens after each of them."""
    cache = model.new_cache(64, BLOCK_TOKENS, 3)
    runner = ModelRunner(model, cache, model.device, max_sequences=3, is_recorded=is_recorded)
    ends, found = [70, 83], []
    for step in range(6):
        plan = StepPlan(
            [
                PlannedSequence(
                    sequence_id=s,
                    token_ids=[(7 * s + 3 * at) % 1000 for at in range(end)] if step == 0 else [9],
                    first_position=0 if step == 0 else end + step - 1,
                    block_table=list(range(16 * s, 16 * s + 16)),
                    is_last=True,
                    sampling=GREEDY,
                    state_slot=2 - s,
                )
                for s, end in enumerate(ends)
            ]
        )
        found.append(runner.forward(plan).clone())
    return found
