"""Checkpoints into modules: what is read, what stays packed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cortex.models import registry
from cortex.models.checkpoints.checkpoint import ARCHITECTURES, Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.sizes import kv_bytes_per_token
from cortex.models.checkpoints.tensors import LOADABLE
from cortex.models.execution import Execution
from cortex.models.linear import Projection
from cortex.models.quantization import Matrix
from cortex.models.weights import activation_dtype, load_model
from tiny_models import (
    Player,
    gguf_name,
    loaded,
    random_llama,
    reference_logits,
    saved_llama,
    saved_model,
    some_tokens,
    write_gguf,
)

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    saved_llama(tmp_path)
    return tmp_path


def change_tensors(directory: Path, change: Any) -> None:
    """Rewrite a checkpoint with its tensors changed in place by *change*."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", LOADABLE)
def test_gguf_logits_equal_transformers_on_the_same_values(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    reference = random_llama(tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.gguf", reference, kind)
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path / "tiny.gguf")).step(a=tokens)["a"]

    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LOADABLE)
def test_weights_take_in_memory_what_they_take_in_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_llama(), kind)

    model = loaded(path)

    assert model.weights_bytes == pytest.approx(Checkpoint.open(path).weights_bytes, rel=0.05)


def test_tied_embeddings_are_in_memory_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(tie_word_embeddings=True), "Q8_0")

    model: Any = loaded(tmp_path / "tiny.gguf").module

    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_tied_checkpoint_may_carry_its_head_all_the_same(tmp_path: Path) -> None:
    reference = saved_llama(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(100, 64)}))

    logits = Player(loaded(tmp_path)).step(a=[1, 2])["a"]

    torch.testing.assert_close(logits, reference_logits(reference, [1, 2]), rtol=1e-4, atol=1e-4)


def test_frequencies_in_an_old_checkpoint_are_passed_over(directory: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(directory, lambda t: t.update({name: torch.ones(8)}))

    assert loaded(directory).num_layers == 3


def test_neighbours_of_different_types_multiply_as_one_matrix(tmp_path: Path) -> None:
    reference = random_llama()
    weight = reference.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight.copy_(weight.to(torch.bfloat16))
    reference.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.v_proj.weight"
    change_tensors(tmp_path, lambda t: t.update({name: t[name].to(torch.bfloat16)}))

    model = loaded(tmp_path)

    module: Any = model.module
    qkv = module.layers[0].self_attn.qkv_proj.weight
    assert [(part.kind, part.rows) for part in qkv.parts] == [("F32", 96), ("BF16", 32)]
    logits = Player(model).step(a=[1, 2, 3])["a"]
    expected = reference_logits(reference, [1, 2, 3])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_dense_weights_take_the_width_of_16_bit_activations(directory: Path) -> None:
    wide, narrow = loaded(directory), loaded(directory, dtype="bfloat16")

    assert narrow.weights_bytes == pytest.approx(wide.weights_bytes / 2, rel=0.05)


def test_quantised_weights_stay_packed_whatever_the_width(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q4_0")

    model = loaded(tmp_path / "tiny.gguf", dtype="bfloat16")

    matrices = [m for m in model.module.modules() if isinstance(m, Matrix)]
    assert {part.kind for matrix in matrices for part in matrix.parts} == {"Q4_0"}


def test_the_file_may_go_away_once_loaded(directory: Path) -> None:
    model = loaded(directory)
    before = Player(model).step(a=[1, 2])["a"]

    weights = directory / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))

    assert torch.equal(Player(model).step(a=[1, 2])["a"], before)


def test_what_the_engine_must_know_is_told(directory: Path) -> None:
    model = loaded(directory)

    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (3, 2, 16)
    assert (model.vocab_size, model.max_position_embeddings) == (100, 512)
    assert model.kv_dtype == torch.float32


def test_a_cache_is_as_large_as_the_arithmetic_says(directory: Path) -> None:
    cache = loaded(directory).new_cache(blocks=5, block_tokens=8)

    per_token = kv_bytes_per_token(Checkpoint.open(directory).config, dtype_bytes=4)
    assert cache.bytes == 5 * 8 * per_token
    assert cache.keys[0].shape == (5, 8, 2, 16)


def test_progress_grows_to_the_bytes_of_all_tensors(directory: Path) -> None:
    told: list[tuple[int, int]] = []

    load_model(directory, device=CPU, dtype="auto", on_progress=lambda *step: told.append(step))

    total = Checkpoint.open(directory).weights_bytes
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_what_on_progress_raises_ends_the_load(directory: Path) -> None:
    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        load_model(directory, device=CPU, dtype="auto", on_progress=cancel)


def test_an_unknown_dtype_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int4' is not one of auto, float32"):
        loaded(directory, dtype="int4")


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("Q4_0", torch.bfloat16),
    ],
)
def test_auto_is_the_checkpoints_own_width_on_a_gpu(
    tmp_path: Path, kind: str, width: torch.dtype
) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), kind)
    checkpoint = Checkpoint.open(tmp_path / "tiny.gguf")

    assert activation_dtype(checkpoint, torch.device("cuda"), "auto") == width


def test_a_missing_tensor_is_named(directory: Path) -> None:
    change_tensors(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(CheckpointError, match=r"'layers.1.mlp.up_proj.weight' is missing"):
        loaded(directory)


def test_a_tensor_without_a_place_is_named(directory: Path) -> None:
    extra = {f"model.layers.0.mlp.extra{i}.weight": torch.ones(2) for i in range(4)}
    change_tensors(directory, lambda t: t.update(extra))

    with pytest.raises(CheckpointError, match=r"no place for: 'layers.0.mlp.extra0.*and 1 more"):
        loaded(directory)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.up_proj.weight", (96, 32)),
        ("model.layers.0.mlp.up_proj.weight", (95, 64)),
        ("model.layers.0.mlp.up_proj.weight", (96 * 64,)),
        ("model.norm.weight", (63,)),
        ("model.norm.weight", (64, 1)),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    directory: Path, name: str, shape: tuple[int, ...]
) -> None:
    change_tensors(directory, lambda t: t.update({name: torch.ones(shape)}))

    with pytest.raises(CheckpointError, match=name.removesuffix(".weight")):
        loaded(directory)


def test_more_layers_than_tensors_are_refused_before_they_are_built(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 9000000')
    )

    with pytest.raises(CheckpointError, match="claims 9000000 layers"):
        loaded(directory)


def test_a_variant_that_is_not_implemented_is_a_checkpoint_error(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))

    with pytest.raises(CheckpointError, match="hidden_act = 'gelu' is not supported"):
        loaded(directory)


def test_a_type_no_kernel_multiplies_is_named(tmp_path: Path) -> None:
    reference = random_llama()
    write_gguf(tmp_path / "tiny.gguf", reference, "MXFP4")

    with pytest.raises(CheckpointError, match="stored as MXFP4, which is not supported"):
        loaded(tmp_path / "tiny.gguf")


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen2")
    change_tensors(tmp_path, lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))

    with pytest.raises(CheckpointError, match=r"'layers.1.self_attn.k_proj.bias' is missing"):
        loaded(tmp_path)


def test_a_bias_without_a_place_is_named(directory: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(directory, lambda t: t.update({name: torch.ones(64)}))

    with pytest.raises(CheckpointError, match=r"no place for: 'layers.0.self_attn.q_proj.bias'"):
        loaded(directory)


@pytest.mark.parametrize("bias", [torch.ones(31), torch.ones(32, 1), torch.ones(64)])
def test_a_bias_of_another_shape_is_named(tmp_path: Path, bias: torch.Tensor) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"
    saved_model(tmp_path, "qwen2")
    change_tensors(tmp_path, lambda t: t.update({name: bias}))

    with pytest.raises(CheckpointError, match=rf"'{name}' is .*, but by the configuration \(32,\)"):
        loaded(tmp_path)


def test_a_bias_that_is_no_float_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"
    saved_model(tmp_path, "qwen2")
    change_tensors(tmp_path, lambda t: t.update({name: torch.ones(32, dtype=torch.int32)}))

    with pytest.raises(CheckpointError, match=rf"'{name}' is stored as I32"):
        loaded(tmp_path)


def test_a_packed_norm_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "packed.gguf", "llama")
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q8_0")
    packed = gguf.quants.quantize(np.ones(64, np.float32), gguf.GGMLQuantizationType.Q8_0)
    for field in gguf.GGUFReader(tmp_path / "tiny.gguf").fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors:
        is_norm = tensor.name == "output_norm.weight"
        kind = gguf.GGMLQuantizationType.Q8_0 if is_norm else tensor.tensor_type
        writer.add_tensor(tensor.name, packed if is_norm else tensor.data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match=r"'output_norm.weight' is Q8_0, not floats"):
        loaded(tmp_path / "packed.gguf")


def test_a_bias_counts_and_moves_with_its_model(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen2")

    model = loaded(tmp_path)

    assert model.weights_bytes == pytest.approx(Checkpoint.open(tmp_path).weights_bytes, rel=0.01)
    moved: Any = model.module.to("meta")
    assert moved.layers[0].self_attn.qkv_proj.bias.device.type == "meta"


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match="architecture 'mamba' is not supported"):
        loaded(tmp_path / "a.gguf")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(directory: Path) -> None:
    weights = directory / "model.safetensors"

    def truncate(done: int, total: int) -> None:
        with weights.open("rb+") as file:
            file.truncate(1000)

    with pytest.raises(CheckpointError, match="the file ended within tensor"):
        load_model(directory, device=CPU, dtype="auto", on_progress=truncate)


def test_a_file_that_cannot_be_read_is_an_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(directory)
    (directory / "model.safetensors").unlink()
    monkeypatch.setattr(Checkpoint, "open", lambda _: checkpoint)

    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        loaded(directory)


def test_the_supervisor_and_the_registry_know_the_same_architectures() -> None:
    assert set(ARCHITECTURES) == set(registry.ARCHITECTURES)


def test_the_test_helper_names_every_parameter() -> None:
    names = {gguf_name(name) for name in random_llama().state_dict()}

    assert len(names) == 3 + 3 * 9


def test_a_model_can_be_moved(directory: Path) -> None:
    model = loaded(directory)

    moved: Any = model.module.to("meta")

    devices = {part.data.device.type for part in moved.embed_tokens.weight.parts}
    assert devices | {b.device.type for b in moved.buffers()} == {"meta"}


def test_products_know_whether_the_batch_may_matter(tmp_path: Path) -> None:
    saved_llama(tmp_path)

    for is_invariant in (True, False):
        model = load_model(
            tmp_path,
            device=CPU,
            dtype="auto",
            on_progress=lambda *_: None,
            execution=Execution(is_batch_invariant=is_invariant),
        )

        products = [m for m in model.module.modules() if isinstance(m, Projection)]
        assert len(products) > 8
        assert {product.is_batch_invariant for product in products} == {is_invariant}
