"""What scripts/bench-step measures, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench_step import KINDS, measure, profile
from whole_steps import BATCHES, WAYS, measure_whole_steps

from cortex.models.kernels.program import Program
from cortex.runtime.device.model_runner import BLOCK_TOKENS
from tiny_models import loaded, random_llama, write_gguf

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_step.py"


def test_it_times_every_kind_of_step_and_its_operations(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q4_0")
    model = loaded(tmp_path / "tiny.gguf", dtype="auto")
    blocks = max(kind.sequences * kind.blocks for kind in KINDS.values())
    step = model.recorded(model.new_cache(blocks, BLOCK_TOKENS))
    assert isinstance(step, Program)

    rows = measure(model, step, rounds=1)
    parts = profile(step, KINDS["8 at context 64"], steps=1)

    assert set(rows) == set(KINDS)
    assert all(row["ms"] >= row["least_ms"] > 0 for row in rows.values())
    assert parts["tiled_linear"] > 0


def test_it_tells_the_forward_of_a_whole_step_from_what_is_beside_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q4_0")

    rows = measure_whole_steps(loaded(tmp_path / "tiny.gguf", dtype="auto"), rounds=1)

    assert set(rows) == {f"{batch}, {way}" for batch in BATCHES for way in WAYS}
    assert all(row["forward_ms"] > 0 < row["beside_ms"] for row in rows.values())
    assert all(0 < row["share"] < 1 for row in rows.values())


def test_a_model_that_is_not_here_ends_it_in_words() -> None:
    ended = subprocess.run(
        [sys.executable, SCRIPT, "nonsense"], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 1
    assert ended.stderr.startswith("bench-step: model 'nonsense' has no source")
