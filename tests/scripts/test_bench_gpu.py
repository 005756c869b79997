"""scripts/bench-gpu, on a CPU: its arithmetic, its models, and that it says what it leaves out."""

import json
import os
import subprocess
from pathlib import Path

import bench_gpu
import pytest
import torch
from bench_gpu import Cell, Round, summary
from gpu_peer import Peer
from random_models import (
    SCALES,
    SHAPES,
    as_transformers,
    random_model,
    random_rows,
    read_bytes,
    state_bytes,
)

from cortex.models.kernels import reference
from cortex.models.quantization import ExpertMatrix, Matrix
from cortex.models.registry import ARCHITECTURES
from tiny_models import Player, reference_logits, some_tokens

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CPU = torch.device("cpu")
MIXTURE = {
    **SHAPES["tiny"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
HYBRID = {
    **SHAPES["27b"],
    **{key: value for key, value in SHAPES["tiny"].items() if key in SHAPES["27b"]},
    "model_type": "qwen3_5_text",
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": SHAPES["27b"]["rope_parameters"],
}


def ran(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str
) -> tuple[str, str]:
    arguments = ["bench-gpu", "--device=cpu", "--shapes=tiny", "--rounds=2", *options.split()]
    monkeypatch.setattr("sys.argv", arguments)
    bench_gpu.main()
    return capsys.readouterr()


def test_a_share_is_the_least_time_of_the_time_taken() -> None:
    rounds = [Round(0.020, None, 1e12), Round(0.010, None, 1e12), Round(0.040, None, 1e12)]

    found = summary(Cell(8, 1000), rounds, weights_bytes=8 * 10**9, kv_bytes=250_000)

    assert found == {
        "ms": 20.0,
        "tokens/s": 400.0,
        "bandwidth": 1e12,
        "share": pytest.approx((8e9 + 2e9) / 1e12 / 0.020),
    }


def test_a_ratio_is_of_one_round() -> None:
    rounds = [Round(1.0, 3.0, 1.0), Round(2.0, 8.0, 1.0), Round(4.0, 8.0, 1.0)]

    found = summary(Cell(1, 512, is_prefill=True), rounds, weights_bytes=1, kv_bytes=1)

    assert [found[name] for name in ("least ratio", "ratio", "largest ratio")] == [2.0, 3.0, 4.0]
    assert found["transformers ms"] == 8000.0
    assert found["tokens/s"] == 256.0
    assert "share" not in found


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_random_model_is_one_of_transformers_too(*, is_tied: bool) -> None:
    shape = {**SHAPES["tiny"], "tie_word_embeddings": is_tied}
    model = random_model(shape, CPU, torch.float32)
    theirs = as_transformers(model, shape)
    tokens = some_tokens(20)

    said = Player(model).step(a=tokens)["a"]

    assert torch.allclose(said, reference_logits(theirs, tokens), atol=1e-4)
    embedding_bytes = 4 * shape["vocab_size"] * shape["hidden_size"]
    assert model.weights_bytes - read_bytes(model, shape) == (0 if is_tied else embedding_bytes)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6b", 0.6), ("8b", 8.2), ("32b", 32.8), ("27b", 26.9), ("30b-a3b", 30.5)],
)
def test_the_shapes_are_as_large_as_their_names(name: str, billions: float) -> None:
    architecture = ARCHITECTURES[SHAPES[name]["model_type"]]
    module = architecture.model(architecture.config(SHAPES[name]), torch.bfloat16)

    total = sum(m.rows * m.columns for m in module.modules() if isinstance(m, Matrix))

    assert total / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("kind", [*SCALES, "FP8"])
def test_random_rows_have_the_spread_of_weights(kind: str) -> None:
    weights = reference.dequantize(kind, random_rows(kind, 16, 1024, CPU))

    assert float(weights.square().mean().sqrt()) == pytest.approx(1 / 32, rel=0.1)
    assert abs(float(weights.mean())) < 0.25 / 32


def test_experts_that_nobody_chooses_are_not_read() -> None:
    model = random_model(MIXTURE, CPU, torch.float32)
    experts = sum(m.bytes for m in model.module.modules() if isinstance(m, ExpertMatrix))

    unread = [model.weights_bytes - read_bytes(model, MIXTURE, tokens) for tokens in (1, 2)]

    embedding = 4 * MIXTURE["vocab_size"] * MIXTURE["hidden_size"]
    assert unread == [embedding + experts // 2, embedding + experts // 4]


@pytest.mark.parametrize(("shape", "weights"), [("hybrid", "bf16"), ("mixture", "q8_0")])
def test_other_models_are_timed_without_transformers(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    weights: str,
) -> None:
    monkeypatch.setattr(bench_gpu, "STEPS", 2)
    monkeypatch.setitem(bench_gpu.COPY_BYTES, "cpu", 2**16)
    for name, values in (("hybrid", HYBRID), ("mixture", MIXTURE)):
        monkeypatch.setitem(SHAPES, name, values)
    options = f"--shapes={shape} --weights={weights} --batches=2 --contexts=16 --prompts=20"
    out, err = ran(capsys, monkeypatch, options)

    found = json.loads(out.splitlines()[-1])[shape]
    assert all(row["ms"] > 0 and "ratio" not in row for row in found.values())
    assert err == "transformers is left out: not a dense model of 16 bits\n"


def test_a_hybrids_states_are_read_and_written() -> None:
    model = random_model(HYBRID, CPU, torch.float32)

    channels, matrices = 2 * 2 * 16 + 2 * 16, 2 * 16 * 16
    assert state_bytes(model) == 2 * 4 * (channels * 3 + matrices)


def test_it_measures_a_tiny_model_beside_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_gpu.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(bench_gpu, "STEPS", 2)
    out, _ = ran(capsys, monkeypatch, "--batches=1,2 --contexts=16 --prompts=20,200 --peer=eager")

    found = json.loads(out.splitlines()[-1])["tiny"]
    assert list(found) == ["prompt of 20", "prompt of 200", "1 at context 16", "2 at context 16"]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in found.values())
    assert found["2 at context 16"]["share"] > 0


def test_without_transformers_times_ours_are_still_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no compiler")

    monkeypatch.setattr(bench_gpu, "STEPS", 2)
    monkeypatch.setitem(bench_gpu.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(Peer, "timed", fail)
    out, err = ran(capsys, monkeypatch, "--batches=1 --contexts=16 --prompts= --peer=eager")

    found = json.loads(out.splitlines()[-1])["tiny"]["1 at context 16"]
    assert found["ms"] > 0
    assert "ratio" not in found
    assert err == "transformers, 1 at context 16: ValueError: no compiler\n"


def test_what_has_no_room_or_no_time_is_left_out_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "GIB", 2**16)  # of memory: 64 KiB
    out, _ = ran(
        capsys, monkeypatch, "--batches=1,8 --contexts=64 --prompts= --peer=none --minutes=0"
    )

    assert "1 at context 64                 left out: out of time" in out
    assert "8 at context 64                 left out: its keys and values do not fit" in out


def test_without_a_gpu_it_ends_in_words() -> None:
    ended = subprocess.run(
        [SCRIPTS / "bench-gpu"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 1
    assert "torch sees no CUDA device here; --device cpu --shapes tiny" in ended.stderr


def test_a_shape_that_nobody_knows_is_refused_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        ran(capsys, monkeypatch, "--shapes=7b")

    assert "'7b' is not one of 0.6b, 8b, 32b, 27b, 30b-a3b, tiny" in capsys.readouterr().err
