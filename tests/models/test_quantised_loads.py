"""Dense checkpoints quantised on the way in, and checkpoints of 8-bit floats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.quantized import is_fp8
from cortex.models.checkpoints.tensors import QUANTS
from cortex.models.kernels import reference
from cortex.models.kernels.quantize import quantize
from cortex.models.linear import Replicated
from cortex.models.loaded_model import LoadedModel
from cortex.models.parallel import ALONE, Group
from cortex.models.quantization import ExpertMatrix, Matrix
from cortex.models.tensor_reader import Files
from cortex.models.weights import load_model
from tiny_loads import values
from tiny_models import Player, random_llama, reference_logits, saved_model, some_tokens, write_gguf

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def load(path: Path, group: Group = ALONE, dtype: str = "float32", **options: Any) -> LoadedModel:
    options.setdefault("on_progress", lambda *_: None)
    return load_model(path, device=CPU, dtype=dtype, group=group, **options)


def matrices(model: LoadedModel) -> dict[str, Matrix]:
    named = model.module.named_modules()
    return {name: child for name, child in named if isinstance(child, Matrix)}


def packed(model: LoadedModel) -> dict[str, list[tuple[str, bytes]]]:
    """Return everything of a model's matrices."""
    return {
        name: [(part.kind, part.data.numpy().tobytes()) for part in matrix.parts]
        for name, matrix in matrices(model).items()
    }


def shard(whole: Matrix, part: Matrix) -> Tensor:
    """Return what *part* must hold, going by *whole*."""
    rows, first = [], 0
    for cut in part.stacked:
        rows += [values(whole)[first + a : first + b] for a, b in cut.ranges]
        first += cut.of
    return torch.cat([torch.cat(rows)[:, a:b] for a, b in part.cut.ranges], 1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    saved_model(directory, "qwen3", num_hidden_layers=1, **WIDE)
    return directory


@pytest.mark.parametrize("quant", QUANTS)
def test_the_matrices_of_layers_and_a_head_of_its_own_are_quantised(
    dense: Path, quant: str
) -> None:
    whole, model = matrices(load(dense)), load(dense, quant=quant)

    for name, matrix in matrices(model).items():
        kind = "F32" if name.startswith("embed_tokens") else QUANTS[quant]
        (part,) = matrix.parts
        assert part.kind == kind
        stored = values(whole[name])
        expected = stored if kind == "F32" else reference.dequantize(kind, quantize(kind, stored))
        assert torch.equal(values(matrix), expected)


def test_a_head_tied_to_the_embedding_stays_as_it_is_stored(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3", num_hidden_layers=1, tie_word_embeddings=True, **WIDE)

    model: Any = load(tmp_path, quant="q4_0").module

    assert model.lm_head.weight is model.embed_tokens.weight
    assert [part.kind for part in model.lm_head.weight.parts] == ["F32"]
    assert [part.kind for part in model.layers[0].mlp.down_proj.weight.parts] == ["Q4_0"]


def test_what_every_rank_holds_whole_stays_dense_and_experts_do_not(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3_moe", num_hidden_layers=1, **WIDE)

    model = load(tmp_path, quant="q8_0")

    for child in model.module.modules():
        if isinstance(child, Replicated):
            assert [part.kind for part in child.weight.parts] == ["F32"]
        if isinstance(child, ExpertMatrix):
            assert [part.kind for part in child.parts] == ["Q8_0"]
    assert any(isinstance(child, Replicated) for child in model.module.modules())
    assert any(isinstance(child, ExpertMatrix) for child in model.module.modules())


def test_rows_that_are_no_whole_number_of_blocks_stay_dense(tmp_path: Path) -> None:
    sizes = {**WIDE, "intermediate_size": 144}
    reference_model = saved_model(tmp_path, "qwen3", num_hidden_layers=1, **sizes)
    tokens = some_tokens(9)

    model: Any = load(tmp_path, quant="q8_0")

    mlp = model.module.layers[0].mlp
    assert [part.kind for part in mlp.down_proj.weight.parts] == ["F32"]
    assert [part.kind for part in mlp.gate_up_proj.weight.parts] == ["Q8_0"]
    logits = Player(model).step(a=tokens)["a"]
    expected = reference_logits(reference_model, tokens)
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.99


@pytest.mark.parametrize("quant", ["q4_1", "fp8"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shards_of_a_quantised_model_are_cut_from_the_whole(
    dense: Path, quant: str, ranks: int
) -> None:
    whole = matrices(load(dense, quant=quant))

    for rank in range(ranks):
        for name, matrix in matrices(load(dense, Group(rank, ranks), quant=quant)).items():
            if matrix.parts[0].kind == whole[name].parts[0].kind:
                assert torch.equal(values(matrix), shard(whole[name], matrix))
            else:
                assert matrix.columns % 128  # only where a block would be cut
                assert quant == "fp8"


def test_weights_quantised_on_the_way_lie_in_tiles_like_any(dense: Path) -> None:
    tokens = some_tokens(9)

    tiled = load(dense, quant="q5_1", dtype="auto")

    head: Any = tiled.module
    assert head.lm_head.weight.parts[0].is_tiled
    expected = Player(load(dense, quant="q5_1")).step(a=tokens)["a"]
    assert torch.allclose(Player(tiled).step(a=tokens)["a"], expected, atol=1e-2)


@pytest.mark.parametrize("quant", [None, "q8_0"])
def test_progress_counts_what_stays(dense: Path, quant: str | None) -> None:
    told: list[tuple[int, int]] = []

    model = load(dense, quant=quant, on_progress=lambda *step: told.append(step))

    total = model.weights_bytes - rotary_bytes(model)
    assert told == sorted(told)
    assert told[0] == (0, total)
    assert told[-1] == (total, total)


@pytest.mark.parametrize("quant", ["q4_2", "Q4_0", "q4_k_m", ""])
def test_an_unknown_quant_is_named(dense: Path, quant: str) -> None:
    with pytest.raises(CheckpointError, match=rf"quant '{quant}' is not one of q8_0, q4_0"):
        load(dense, quant=quant)


def test_a_gguf_file_is_not_quantised_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q8_0")

    with pytest.raises(CheckpointError, match="'q4_0' is for dense safetensors; this is as it is"):
        load(tmp_path / "tiny.gguf", quant="q4_0")


# ---- what is kept of it ----


def reads_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """Count the bytes that loads read of a file or of all in a directory."""
    counts: dict[str, int] = {}

    class Counted(Files):
        def _fill(self, view: memoryview, tensor: Any, offset: int) -> None:
            name = str(tensor.path)
            counts[name] = counts.get(name, 0) + len(view)
            super()._fill(view, tensor, offset)

    monkeypatch.setattr("cortex.models.weights.Files", Counted)
    return lambda path: sum(n for name, n in counts.items() if Path(name).is_relative_to(path))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_next_load_reads_what_was_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    first = load(dense, quant="q4_0", cache_directory=tmp_path / "kept", dtype="float32")
    read = reads_of(monkeypatch)

    second = load(dense, quant="q4_0", cache_directory=tmp_path / "kept", dtype=dtype)

    quantised = sum(m.bytes for m in matrices(first).values() if m.parts[0].kind == "Q4_0")
    assert read(tmp_path) == quantised
    assert read(dense) == first.weights_bytes - quantised - rotary_bytes(first)
    assert packed(second) == packed(load(dense, quant="q4_0", dtype=dtype))


def rotary_bytes(model: LoadedModel) -> int:
    """Bytes of what no checkpoint holds."""
    return sum(b.nbytes for name, b in model.module.named_buffers() if "frequencies" in name)


def test_every_rank_and_kind_has_a_file_of_its_own(dense: Path, tmp_path: Path) -> None:
    for quant in ("q4_0", "q8_0"):
        for rank in range(2):
            load(dense, Group(rank, 2), quant=quant, cache_directory=tmp_path)
            load(dense, Group(rank, 2), quant=quant, cache_directory=tmp_path)

    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("place", [0.3, 0.999])
def test_a_kept_file_that_is_damaged_is_made_anew(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: float
) -> None:
    first = load(dense, quant="q4_0", cache_directory=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    content = bytearray(good)
    content[int(place * len(content))] ^= 255
    path.write_bytes(content)

    second = load(dense, quant="q4_0", cache_directory=tmp_path)

    assert "quantised weights are made anew" in caplog.text
    assert packed(second) == packed(first)
    assert path.read_bytes() == good


def test_a_checkpoint_that_changed_is_quantised_again(tmp_path: Path) -> None:
    saved_model(tmp_path / "model", "qwen3", num_hidden_layers=1, **WIDE)
    weights = tmp_path / "model" / "model.safetensors"
    before = load(tmp_path / "model", quant="q4_0", cache_directory=tmp_path / "kept")
    tensors = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights)

    after = load(tmp_path / "model", quant="q4_0", cache_directory=tmp_path / "kept")

    assert packed(after) == packed(load(tmp_path / "model", quant="q4_0"))
    assert packed(after) != packed(before)


def test_a_load_that_is_cancelled_keeps_nothing(dense: Path, tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        load(dense, quant="q4_0", cache_directory=tmp_path, on_progress=cancel)

    assert not list(tmp_path.iterdir())


def test_a_dense_load_keeps_nothing(dense: Path, tmp_path: Path) -> None:
    load(dense, cache_directory=tmp_path)

    assert not list(tmp_path.iterdir())


# ---- checkpoints of 8-bit floats ----


def as_fp8(directory: Path, scales: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Save a model as Qwen3's FP8 checkpoints are; return it with the values that were stored."""
    model = saved_model(directory, "qwen3", num_hidden_layers=1, **{**WIDE, **sizes})
    weights = directory / "model.safetensors"
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(weights).items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        rows = tensor.size(0)
        padded = nn.functional.pad(tensor, (0, 0, 0, -rows % 128))
        blocks = padded.view(len(padded) // 128, 128, -1, 128)
        scale = (blocks.abs().amax((1, 3)) / 448).to(scales)
        codes = (blocks / scale.float()[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = codes.flatten(2).flatten(0, 1)[:rows].contiguous()
        stored[f"{name}_scale_inv"] = scale
        exact = (codes.float() * scale.float()[:, None, :, None]).flatten(2).flatten(0, 1)
        model.get_parameter(name).data.copy_(exact[:rows])
    save_file(stored, weights)
    say(directory, FP8)
    return model


def say(directory: Path, quantization: Any) -> None:
    config = directory / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": quantization})
    )


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_logits_of_8_bit_floats_equal_transformers_on_the_same_values(
    tmp_path: Path, scales: torch.dtype
) -> None:
    reference_model = as_fp8(tmp_path, scales, intermediate_size=384, num_key_value_heads=1)
    tokens = some_tokens(20)

    model = load(tmp_path)

    kinds = {part.kind for matrix in matrices(model).values() for part in matrix.parts}
    assert kinds == {"F32", "FP8"}
    logits = Player(model).step(a=tokens)["a"]
    expected = reference_logits(reference_model, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [512, 384])
def test_8_bit_floats_are_cut_where_their_blocks_end(tmp_path: Path, inner: int) -> None:
    as_fp8(tmp_path, intermediate_size=inner)
    whole = matrices(load(tmp_path))

    for rank in range(2):
        for name, matrix in matrices(load(tmp_path, Group(rank, 2))).items():
            assert torch.equal(values(matrix), shard(whole[name], matrix))


def test_8_bit_floats_in_pieces_find_their_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_fp8(tmp_path)
    whole = packed(load(tmp_path))
    monkeypatch.setattr("cortex.models.filler.PIECE_BYTES", 48 * 128)  # rows 96 to 143, and so on

    assert packed(load(tmp_path)) == whole


def test_a_rank_does_not_take_a_part_of_a_block(tmp_path: Path) -> None:
    as_fp8(tmp_path, intermediate_size=128)

    with pytest.raises(
        CheckpointError,
        match=r"columns 0 to 63 of 128 are no whole number of F8_E4M3 blocks of 128",
    ):
        load(tmp_path, Group(0, 2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, name: t.pop(f"{name}_scale_inv"), r"scale_inv' is missing"),
        (
            lambda t, name: t.update({f"{name}_scale_inv": torch.ones(2, 2)}),
            r"scale_inv' is \(2, 2\), but by the configuration \(1, 2\)",
        ),
        (
            lambda t, name: t.update({f"{name}_scale_inv": torch.ones(1, 2, dtype=torch.int32)}),
            r"scale_inv' is stored as I32",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor], str], None], says: str
) -> None:
    as_fp8(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, "model.layers.0.mlp.down_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


def test_8_bit_floats_are_not_quantised_again(tmp_path: Path) -> None:
    as_fp8(tmp_path)

    with pytest.raises(CheckpointError, match="'q8_0' is for dense safetensors"):
        load(tmp_path, quant="q8_0")


def test_8_bit_floats_without_a_word_in_the_configuration_are_refused(tmp_path: Path) -> None:
    as_fp8(tmp_path)
    say(tmp_path, None)

    with pytest.raises(CheckpointError, match="stored as F8_E4M3, which is not supported"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "awq"}, "is quantised by 'awq', which is not supported"),
        ({"quant_method": "gptq", "bits": 4}, "by 'gptq'"),
        ({"quant_method": "bitsandbytes"}, "by 'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, "by 'compressed-tensors'"),
        ({}, "by None"),
        ("fp8", "by 'fp8'"),
        ({**FP8, "weight_block_size": [64, 128]}, r"weight_block_size = \[64, 128\], not \[128"),
        ({"quant_method": "fp8"}, "weight_block_size = None"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme = 'static', not dynamic"),
        ({**FP8, "fmt": "e5m2"}, "fmt = 'e5m2', not e4m3"),
    ],
)
def test_other_quantisations_are_refused_in_words(
    dense: Path, tmp_path: Path, quantization: Any, says: str
) -> None:
    (tmp_path / "model.safetensors").symlink_to(dense / "model.safetensors")
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    say(tmp_path, quantization)

    with pytest.raises(CheckpointError, match=says) as raised:
        Checkpoint.open(tmp_path).check_supported()

    assert str(raised.value).startswith(f"{tmp_path}: is ")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_a_dense_checkpoint_says_nothing(config: dict[str, Any]) -> None:
    assert not is_fp8(config)
