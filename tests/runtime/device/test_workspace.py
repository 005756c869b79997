"""What a step needs is measured on small ones and holds for large ones."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.models.batch import Batch
from cortex.runtime.device.model_runner import ModelRunner
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from cortex.runtime.device.workspace import living_bytes, measure_workspace, probe_tokens
from engine_fakes import FakeModel, RecallingModule
from tiny_models import loaded, saved_model

KIB = 1024


def test_tensors_alive_at_once_are_added_up() -> None:
    def compute() -> Tensor:
        first = torch.zeros(KIB, dtype=torch.uint8)
        return torch.cat([first, first])

    assert living_bytes(compute) == [KIB, 3 * KIB]


def test_a_tensor_that_is_gone_does_not_count_with_the_next() -> None:
    def compute() -> None:
        for _ in range(5):
            torch.zeros(KIB, dtype=torch.uint8)

    assert max(living_bytes(compute)) == KIB


def test_views_and_what_was_there_before_cost_nothing() -> None:
    weights = torch.zeros(64, 64)

    assert not any(living_bytes(lambda: weights.t()[3:].unsqueeze(0).add_(1)))


def test_every_tensor_of_a_result_with_many_counts() -> None:
    assert living_bytes(lambda: torch.zeros(8, dtype=torch.uint8).sort())[-1] == 8 + 8 + 8 * 8


class Square(RecallingModule):
    """Takes a byte for every token and position that the token looks at, and 7 per token."""

    def forward(self, batch: Batch) -> Tensor:
        tokens, context = len(batch.token_ids), int(batch.context_tokens.max())
        attention = torch.zeros(tokens, context, dtype=torch.uint8)
        hidden = torch.zeros(tokens, 7, dtype=torch.uint8)
        return attention[:1, :1].float() + hidden[:1, :1]


def test_a_large_step_is_what_the_small_ones_foretell() -> None:
    model = FakeModel(Square(), max_position_embeddings=2048)

    workspace = measure_workspace(model, torch.device("cpu"), token_budget=512, beside_bytes=10_000)

    true = 512 * 2048 + 512 * 7 + 10_000
    assert true <= workspace.at(2048) < true + 200_000  # the batch's own tensors are in it


class Unpacking(RecallingModule):
    """Unpacks 100 KiB of weights, whatever the tokens, before it makes 5 bytes for each."""

    def forward(self, batch: Batch) -> Tensor:
        torch.zeros(100 * KIB, dtype=torch.uint8)
        return torch.zeros(len(batch.token_ids), 5, dtype=torch.uint8)[:1].float()


def test_what_does_not_grow_with_the_tokens_is_not_multiplied_by_them() -> None:
    model = FakeModel(Unpacking())

    workspace = measure_workspace(model, torch.device("cpu"), token_budget=512, beside_bytes=0)

    assert 100 * KIB <= workspace.at(2048) < 200 * KIB


@pytest.mark.parametrize("budget", [100, 128])
def test_the_buffers_of_recorded_steps_are_within_it(tmp_path: Path, budget: int) -> None:
    saved_model(tmp_path, "qwen3", head_dim=16)
    model = loaded(tmp_path)
    workspace = measure_workspace(model, torch.device("cpu"), budget, beside_bytes=0)
    runner = ModelRunner(model, model.new_cache(32, 16), torch.device("cpu"))
    sampling = SamplingParams(temperature=0.0, max_tokens=1, seed=0)

    runner.forward(
        StepPlan([PlannedSequence(0, [1] * budget, 384, list(range(32)), True, sampling)])
    )

    assert 0.9 * workspace.fixed_bytes < runner.buffer_bytes <= workspace.fixed_bytes


class Trying(Unpacking):
    """Takes 300 KiB at its first step, to try something out."""

    def forward(self, batch: Batch) -> Tensor:
        self.steps += 1
        if self.steps == 1:
            torch.zeros(300 * KIB, dtype=torch.uint8)
        return super().forward(batch)


def test_what_is_tried_out_once_is_not_counted() -> None:
    measured = [
        measure_workspace(FakeModel(module), torch.device("cpu"), token_budget=512, beside_bytes=0)
        for module in (Trying(), Unpacking())
    ]

    assert measured[0] == measured[1]


class Wandering(RecallingModule):
    """Runs an operation for every token, so that steps cannot be compared one by one."""

    def forward(self, batch: Batch) -> Tensor:
        return torch.stack([torch.zeros(KIB) for _ in batch.token_ids])[:1]


def test_steps_of_other_operations_still_give_a_bound() -> None:
    model = FakeModel(Wandering())

    workspace = measure_workspace(model, torch.device("cpu"), token_budget=512, beside_bytes=0)

    assert workspace.at(2048) >= 2 * 512 * KIB * 4


def test_graphs_keep_a_decode_step_of_theirs_and_the_logits_of_each() -> None:
    model = FakeModel(Square(), max_position_embeddings=2048)
    measured = partial(measure_workspace, model, torch.device("cpu"), 512, 0)

    without, workspace = measured(), measured(graph_rows=[1, 2, 8])

    logits = 4 * (1 + 2 + 8) * model.vocab_size
    step = 8 * 2048 + 8 * 7
    assert step + logits <= workspace.graph_bytes < 2 * step + logits
    assert workspace.fixed_bytes - workspace.graph_bytes == without.fixed_bytes
    assert without.graph_bytes == 0


@pytest.mark.parametrize("has_states", [False, True])
def test_a_gpu_is_measured_on_steps_that_go_the_ways_of_large_ones(*, has_states: bool) -> None:
    from cortex.models.kernels.reference_delta import CHUNK_TOKENS
    from cortex.models.kernels.triton_experts import PAIRS_BY_THEMSELVES
    from cortex.models.kernels.triton_quantized import UNPACKED_FROM

    few, more = probe_tokens("cuda", has_states=has_states)

    assert few < more
    assert few >= UNPACKED_FROM
    assert few > PAIRS_BY_THEMSELVES
    assert few % CHUNK_TOKENS == more % CHUNK_TOKENS == 0


def test_a_model_made_for_very_few_tokens_can_be_measured() -> None:
    model = FakeModel(max_position_embeddings=2)

    assert measure_workspace(model, torch.device("cpu"), 512, 100).at(2) > 100


def test_measuring_does_not_import_the_compiler_of_torch() -> None:
    code = """
import sys, torch
from cortex.runtime.device.workspace import living_bytes
sys.exit(living_bytes(lambda: torch.ones(8) + 1)[-1] != 64 or "torch._dynamo" in sys.modules)
"""

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
