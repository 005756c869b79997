"""The hybrids of Gated DeltaNet and attention against transformers, from both kinds of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.sizes import kv_bytes_per_token, linear_layers, state_bytes
from cortex.models.kernels import cpu
from rank_threads import on_ranks
from tiny_hybrids import MODEL_TYPES, random_hybrid, saved_hybrid, write_hybrid_gguf
from tiny_models import SIZES, STATE_SLOTS, Player, loaded, reference_logits, some_tokens

ODD_SIZES = {
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 20,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_conv_kernel_dim": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "one value head per key head": {"linear_num_value_heads": 2},
    "sizes that fill no vector": ODD_SIZES,
    "layers named": {"layer_types": ["full_attention", "linear_attention"] * 2},
    "attention every second layer": {"full_attention_interval": 2},
    "half of a head turns": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "partial_rotary_factor": 0.5,
        }
    },
}
MODELS = [
    *[("qwen3_5_text", variant) for variant in VARIANTS],
    *[(name, variant) for name in MODEL_TYPES[1:] for variant in ("as it is", "tied")],
    ("qwen3_next", "sizes that fill no vector"),
]
SHARED = [
    ("qwen3_5_text", "safetensors", 4),
    ("qwen3_5_text", "Q8_0", 2),
    ("qwen3_5_moe_text", "safetensors", 2),
    ("qwen3_5_moe_text", "Q8_0", 4),
    ("qwen3_next", "safetensors", 2),
    ("qwen3_next", "Q8_0", 4),
]
"""Each model from both sources and by both numbers of ranks, each source by both numbers."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid as it is, in a directory to be copied before it is changed."""
    directory = tmp_path_factory.mktemp("plain")
    saved_hybrid(directory, "qwen3_5_text")
    return directory


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "kernels", lambda: None)


def assert_same_logits(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal as the issue says it: the largest difference, the direction, and the choice."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=5e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert torch.cosine_similarity(logits, expected, dim=-1).min() > 0.9999


@pytest.mark.parametrize(("model_type", "variant"), MODELS)
def test_logits_equal_those_of_transformers(tmp_path: Path, model_type: str, variant: str) -> None:
    reference = saved_hybrid(tmp_path, model_type, **VARIANTS[variant])
    tokens = some_tokens(150)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    assert_same_logits(logits, reference_logits(reference, tokens))


@pytest.mark.parametrize("only", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}])
def test_some_layers_of_qwen3_next_may_be_dense(tmp_path: Path, only: dict[str, Any]) -> None:
    reference = saved_hybrid(tmp_path, "qwen3_next", **only)
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    assert_same_logits(logits, reference_logits(reference, tokens))


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_equal_those_of_transformers_without_kernels_too(
    tmp_path: Path, model_type: str
) -> None:
    reference = saved_hybrid(tmp_path, model_type)
    tokens = some_tokens(80)
    player = Player(loaded(tmp_path))

    logits = torch.cat([player.step(a=tokens[:70])["a"], player.step(a=tokens[70:])["a"]])

    assert_same_logits(logits, reference_logits(reference, tokens))


def test_the_text_half_of_a_model_that_sees_is_loaded_and_nothing_else(tmp_path: Path) -> None:
    reference = saved_hybrid(tmp_path, "qwen3_5_text", tie_word_embeddings=True)
    as_half_of_a_model_that_sees(tmp_path)
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    assert_same_logits(logits, reference_logits(reference, tokens))
    checkpoint = Checkpoint.open(tmp_path)
    assert not any("visual" in name or "mtp" in name for name in checkpoint.tensors)
    assert checkpoint.config["model_type"] == "qwen3_5_text"


def test_other_tensors_without_a_place_are_still_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.audio.weight": torch.ones(2)}, file)

    with pytest.raises(CheckpointError, match=r"no place for: 'audio\.weight'"):
        loaded(tmp_path)


def as_half_of_a_model_that_sees(directory: Path) -> None:
    """Make of a checkpoint of text what Qwen3_5ForConditionalGeneration saves."""
    path, file = directory / "config.json", directory / "model.safetensors"
    text = json.loads(path.read_text())
    is_tied = text.pop("tie_word_embeddings")
    path.write_text(
        json.dumps(
            {
                "model_type": "qwen3_5",
                "text_config": {**text, "tie_word_embeddings": not is_tied},
                "vision_config": {"hidden_size": 8},
                "tie_word_embeddings": is_tied,
            }
        )
    )
    tensors = {
        name.replace("model.", "model.language_model."): tensor
        for name, tensor in load_file(file).items()
    }
    tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.ones(24, 8)
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.ones(64)
    save_file(tensors, file)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_gguf_file_gives_the_logits_of_transformers_on_its_values(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    reference = random_hybrid(model_type, tie_word_embeddings=kind == "F16")
    write_hybrid_gguf(tmp_path / "tiny.gguf", reference, kind)
    tokens = some_tokens(80)

    logits = Player(loaded(tmp_path / "tiny.gguf")).step(a=tokens)["a"]

    assert_same_logits(logits, reference_logits(reference, tokens))


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_a_gguf_file_may_have_in_one_tensor_what_others_have_in_two(
    tmp_path: Path, model_type: str
) -> None:
    reference = random_hybrid(model_type)
    write_hybrid_gguf(tmp_path / "tiny.gguf", reference, "F32", is_joined=True)
    tokens = some_tokens(20)

    logits = Player(loaded(tmp_path / "tiny.gguf")).step(a=tokens)["a"]

    assert_same_logits(logits, reference_logits(reference, tokens))


def test_the_layers_of_a_gguf_file_that_draft_tokens_are_not_loaded(tmp_path: Path) -> None:
    reference = random_hybrid("qwen3_5_text")
    write_hybrid_gguf(tmp_path / "tiny.gguf", reference, "F32", drafting_layers=1)
    tokens = some_tokens(20)

    logits = Player(loaded(tmp_path / "tiny.gguf")).step(a=tokens)["a"]

    assert_same_logits(logits, reference_logits(reference, tokens))


@pytest.mark.parametrize(("model_type", "source", "ranks"), SHARED)
def test_several_ranks_compute_what_one_does(
    tmp_path: Path, model_type: str, source: str, ranks: int
) -> None:
    sizes = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "intermediate_size": 128}
    experts = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    overrides = {**sizes, **({} if model_type == "qwen3_5_text" else experts)}
    path = tmp_path
    if source == "safetensors":
        saved_hybrid(tmp_path, model_type, **overrides)
    else:
        path = tmp_path / "tiny.gguf"
        overrides["hidden_size"] = 128  # of 4 ranks each has whole blocks
        write_hybrid_gguf(path, random_hybrid(model_type, **overrides), source)
    tokens = some_tokens(40)
    alone = Player(loaded(path)).step(a=tokens)["a"]

    def rank_logits(group: Any) -> torch.Tensor:
        player = Player(loaded(path, group=group))
        assert player.cache.states[0].delta.size(1) == 8 // ranks
        return torch.cat([player.step(a=tokens[:30])["a"], player.step(a=tokens[30:])["a"]])

    for logits in on_ranks(ranks, rank_logits):
        assert_same_logits(logits, alone)


def test_heads_that_do_not_divide_among_the_ranks_are_refused_in_words(tmp_path: Path) -> None:
    saved_hybrid(tmp_path, "qwen3_5_text", linear_num_key_heads=2, num_attention_heads=4)

    with pytest.raises(ValueError, match="2 key heads of the delta rule do not divide among 4"):
        on_ranks(4, lambda group: loaded(tmp_path, group=group))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 4}, "no layer that attends"),
        ({"layer_types": None, "full_attention_interval": 9}, "no layer that attends"),
        ({"linear_num_value_heads": 5}, "5 value heads do not divide among 2 key heads"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ({"linear_conv_kernel_dim": 64}, "linear_conv_kernel_dim"),
        ({"linear_key_head_dim": "16"}, "linear_key_head_dim"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_makes_another_model_of_it_is_refused_in_words(
    plain: Path, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))

    with pytest.raises(CheckpointError, match=said):
        loaded(tmp_path)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_estimates_are_what_the_caches_take(tmp_path: Path, model_type: str) -> None:
    saved_hybrid(tmp_path, model_type, linear_conv_kernel_dim=3)
    config = Checkpoint.open(tmp_path).config

    cache = loaded(tmp_path).new_cache(2, 16, STATE_SLOTS)

    keys_and_values = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert kv_bytes_per_token(config, 4) * 2 * 16 == keys_and_values
    assert state_bytes(config) * STATE_SLOTS == cache.bytes - keys_and_values
    assert linear_layers(config) == len(cache.states) == 3


def test_a_model_without_recurrent_layers_has_no_state() -> None:
    assert state_bytes({"model_type": "qwen3", **SIZES}) == 0


def test_the_27b_keeps_as_much_as_its_configuration_implies() -> None:
    config = {"model_type": "qwen3_5_text", "num_hidden_layers": 64, "linear_num_value_heads": 48}

    assert state_bytes(config) == 48 * (10240 * 3 + 48 * 128 * 128) * 4
