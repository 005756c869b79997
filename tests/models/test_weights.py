"""Checkpoints into modules: what is read, what stays packed, and what is refused."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cortex.models import registry, weights
from cortex.models.checkpoints.checkpoint import ARCHITECTURES, Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.sizes import kv_bytes_per_token
from cortex.models.execution import Execution
from cortex.models.linear import Projection
from cortex.models.loaded_model import LoadedModel
from cortex.models.parallel import Cut, Group
from cortex.models.quantization import Matrix
from cortex.models.tensor_reader import PIECE_BYTES, Files
from cortex.models.weights import activation_dtype, load_model
from tiny_loads import CountedReads, values
from tiny_models import (
    SIZES,
    Player,
    gguf_name,
    loaded,
    random_llama,
    random_model,
    reference_logits,
    saved_llama,
    saved_model,
    some_tokens,
    write_gguf,
)

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""The types that the gguf library can quantise to."""


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
@pytest.mark.parametrize("kind", KINDS)
def test_gguf_logits_equal_transformers_on_the_same_values(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    reference = random_llama(tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.gguf", reference, kind)
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path / "tiny.gguf")).step(a=tokens)["a"]

    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
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

    assert loaded(directory).caches.layers == 3


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

    assert (model.caches.layers, model.caches.kv_heads, model.caches.head_dim) == (3, 2, 16)
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


# ---- ranks ----


def matrices(model: LoadedModel) -> dict[str, Matrix]:
    named = model.module.named_modules()
    return {name: child for name, child in named if isinstance(child, Matrix)}


def shard(whole: Tensor, cuts: tuple[Cut, ...], columns: Cut) -> Tensor:
    """Return the part of *whole* [rows of all, columns] that the cuts mean."""
    rows, first = [], 0
    for cut in cuts:
        rows += [whole[first + a : first + b] for a, b in cut.ranges]
        first += cut.of
    return torch.cat([torch.cat(rows)[:, a:b] for a, b in columns.ranges], 1)


SHARED = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that ranks can share, by how they are stored."""
    directory = tmp_path_factory.mktemp("shared")
    saved_model(directory / "llama", "llama", tie_word_embeddings=True, **SHARED)
    saved_model(directory / "qwen2", "qwen2", **SHARED)
    saved_model(directory / "qwen3_moe", "qwen3_moe", **SHARED)
    write_gguf(directory / "llama.gguf", random_llama(**SHARED), "Q8_0")
    write_gguf(directory / "qwen3_moe.gguf", random_model("qwen3_moe", **SHARED), "F16")
    return {path.name: path for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "llama.gguf", "qwen3_moe.gguf"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_its_cuts_of_the_whole(
    shared: dict[str, Path], name: str, ranks: int
) -> None:
    whole = loaded(shared[name])
    biases = dict(whole.module.named_buffers())

    for rank in range(ranks):
        part = loaded(shared[name], group=Group(rank, ranks))

        for place, matrix in matrices(part).items():
            expected = shard(values(matrices(whole)[place]), matrix.stacked, matrix.cut)
            assert torch.equal(values(matrix), expected), place
        for place, child in part.module.named_modules():
            if isinstance(child, Projection) and child.bias is not None:
                bias = biases[f"{place}.bias"][:, None]
                expected = shard(bias, child.weight.stacked, Cut.whole(1))
                assert torch.equal(child.bias, expected[:, 0]), place
        assert part.caches.kv_heads == max(1, 2 // ranks)


@pytest.mark.parametrize("name", ["llama", "llama.gguf", "qwen3_moe"])
def test_a_rank_reads_what_it_holds_and_the_rest_of_split_rows(
    shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    reads = CountedReads()
    monkeypatch.setattr(weights, "Files", lambda: Files(reads))
    told: list[tuple[int, int]] = []

    model = load_model(
        shared[name],
        device=CPU,
        dtype="float32",
        on_progress=lambda *step: told.append(step),
        group=Group(1, 2),
    )

    made_here = sum(b.nbytes for key, b in model.module.named_buffers() if "frequencies" in key)
    held = model.weights_bytes - made_here
    others_columns = sum(m.bytes for m in matrices(model).values() if not m.cut.is_whole)
    assert told[-1] == (held, held)
    assert held <= reads.bytes <= held + others_columns
    assert held < 0.55 * Checkpoint.open(shared[name]).weights_bytes


def test_heads_that_do_not_divide_are_refused_in_words(shared: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"llama: .* divide among 3 ranks"):
        loaded(shared["llama"], group=Group(0, 3))


def test_columns_of_a_packed_matrix_are_cut_between_blocks_only(tmp_path: Path) -> None:
    sizes = {**SHARED, "intermediate_size": 32}
    write_gguf(tmp_path / "tiny.gguf", random_llama(**sizes), "Q4_0")

    with pytest.raises(
        CheckpointError,
        match=r"'blk.0.ffn_down.weight': columns 16 to 31 of 32 are no whole number of Q4_0 blocks",
    ):
        loaded(tmp_path / "tiny.gguf", group=Group(1, 2))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_pieces_cut_no_tile_and_no_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    sizes = {"num_hidden_layers": 1, "head_dim": 24, "tie_word_embeddings": True}
    write_gguf(tmp_path / "tiny.gguf", random_llama(**sizes), "Q5_0")
    whole = loaded(tmp_path / "tiny.gguf", dtype=dtype)
    monkeypatch.setattr("cortex.models.filler.PIECE_BYTES", 20 * 44)  # 20 rows of 64 in Q5_0

    cut = loaded(tmp_path / "tiny.gguf", dtype=dtype)

    for name, matrix in matrices(cut).items():
        for part, expected in zip(matrix.parts, matrices(whole)[name].parts, strict=True):
            assert torch.equal(part.data, expected.data), name


# ---- memory ----


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


MEBIBYTE = 1 << 20


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "head_dim": 128}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 63 MB, in rows of 2 KiB and more."""
    directory = tmp_path_factory.mktemp("large")
    config = AutoConfig.for_model("qwen3", **{**SIZES, **LARGE})
    config.save_pretrained(directory)
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        shapes = auto.from_config(config).state_dict()
    block = torch.randn(1 << 16).to(torch.bfloat16)
    tensors = {
        name: block.repeat(-(-meta.numel() // block.numel()))[: meta.numel()].view(meta.shape)
        for name, meta in shapes.items()
    }
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize(
    ("dtype", "quant", "beside"),
    [
        ("auto", None, 0),
        ("bfloat16", None, 0),
        ("float16", None, 2 * PIECE_BYTES),  # a piece for each reader, before its width changes
        ("auto", "q8_0", 12 * MEBIBYTE),  # and what the heap keeps of the floats between
    ],
)
def test_a_load_takes_little_more_than_the_weights(
    large: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, quant: str | None, beside: int
) -> None:
    monkeypatch.setattr(weights, "MAX_READERS", 2)
    load_model(large, device=CPU, dtype=dtype, on_progress=lambda *_: None, quant=quant)
    gc.collect()
    before, most = anonymous_bytes(), 0

    def look(done: int, total: int) -> None:
        nonlocal most
        most = max(most, anonymous_bytes() - before)

    model = load_model(large, device=CPU, dtype=dtype, on_progress=look, quant=quant)

    now = anonymous_bytes() - before
    assert most <= model.weights_bytes + beside + 4 * MEBIBYTE
    kept = (12 if quant else 4) * MEBIBYTE
    assert now == pytest.approx(model.weights_bytes, abs=kept)
    del model
    gc.collect()
    assert anonymous_bytes() - before < kept


def test_a_cancelled_load_gives_everything_back(large: Path) -> None:
    loaded(large)
    gc.collect()
    before = anonymous_bytes()

    def cancel(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model(large, device=CPU, dtype="auto", on_progress=cancel)

    assert anonymous_bytes() - before < 4 * MEBIBYTE
    assert not [thread for thread in threading.enumerate() if thread.name == "reader"]
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert large / WEIGHTS not in held
