"""What headers say of a rank is what a rank that was loaded holds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.sharding import (
    Indivisible,
    Sharing,
    check_divides,
    kv_heads_of_rank,
    split_of,
    weights_of_rank,
)
from cortex.models.checkpoints.sizes import kv_bytes_per_token, state_bytes
from cortex.models.loaded_model import LoadedModel
from cortex.models.parallel import Group
from cortex.models.weights import load_model
from tiny_hybrids import MODEL_TYPES, random_hybrid, saved_hybrid, write_hybrid_gguf
from tiny_models import random_model, saved_model, write_gguf

DENSE = ("llama", "qwen2", "qwen3", "qwen3_moe")
ROOMY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
"""Of which also four ranks get whole blocks of 32."""
INNER = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A checkpoint of each architecture as safetensors, and of some as GGUF, by name."""
    base = tmp_path_factory.mktemp("sharding")
    found = {name: base / name for name in (*DENSE, *MODEL_TYPES, "tied")}
    for name in DENSE:
        saved_model(found[name], name, **ROOMY)
    for name in MODEL_TYPES:
        saved_hybrid(found[name], name)
    saved_model(found["tied"], "qwen3", **ROOMY, tie_word_embeddings=True)
    for name in ("llama", "qwen3_moe"):
        write_gguf(base / f"{name}.gguf", random_model(name, **ROOMY, **INNER), "Q4_0")
        found[f"{name}.gguf"] = base / f"{name}.gguf"
    for name in MODEL_TYPES:
        write_hybrid_gguf(base / f"{name}.gguf", random_hybrid(name, **ROOMY, **INNER), "Q8_0")
        found[f"{name}.gguf"] = base / f"{name}.gguf"
    return found


def held(
    path: Path, rank: int, ranks: int, dtype: str = "float32", quant: str | None = None
) -> LoadedModel:
    """Load one rank, in float32, which is without tiles."""
    return load_model(
        path,
        device=torch.device("cpu"),
        dtype=dtype,
        on_progress=lambda *_: None,
        quant=quant,
        group=Group(rank, ranks),
    )


def weights_bytes(model: LoadedModel) -> int:
    """Return the bytes of a rank's weights; the rotary frequencies beside them are in no file."""
    rotary = sum(buffer.nbytes for buffer in model.module.get_submodule("rotary").buffers())
    return model.weights_bytes - rotary


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        *(*DENSE, *MODEL_TYPES, "tied", "llama.gguf", "qwen3_moe.gguf"),
        *(f"{name}.gguf" for name in MODEL_TYPES),
    ],
)
def test_every_rank_holds_what_its_headers_say(
    checkpoints: Mapping[str, Path], name: str, ranks: int
) -> None:
    checkpoint = Checkpoint.open(checkpoints[name])
    expected = weights_of_rank(checkpoint, Sharing(ranks))

    for rank in range(ranks):
        model = held(checkpoints[name], rank, ranks)
        assert weights_bytes(model) == expected
        assert model.caches.kv_heads == kv_heads_of_rank(checkpoint.config, ranks)


def test_more_ranks_than_key_value_heads_hold_one_each(checkpoints: Mapping[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["llama"])

    model = held(checkpoints["llama"], 3, 4)

    assert weights_bytes(model) == weights_of_rank(checkpoint, Sharing(4))
    assert kv_heads_of_rank(checkpoint.config, 4) == model.caches.kv_heads == 1


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "fp8"])
@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "qwen3_next"])
def test_what_is_quantised_on_the_way_is_counted_as_that(
    checkpoints: Mapping[str, Path], name: str, quant: str
) -> None:
    checkpoint = Checkpoint.open(checkpoints[name])

    model = held(checkpoints[name], 1, 2, quant=quant)

    assert weights_bytes(model) == weights_of_rank(checkpoint, Sharing(2, quant))


def test_dense_weights_become_as_wide_as_what_is_computed(checkpoints: Mapping[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["qwen2"])

    model = held(checkpoints["qwen2"], 0, 2, dtype="bfloat16")

    assert weights_bytes(model) == weights_of_rank(checkpoint, Sharing(2, is_wide=False))


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_states_are_shared_evenly(checkpoints: Mapping[str, Path], name: str) -> None:
    checkpoint = Checkpoint.open(checkpoints[name])

    cache = held(checkpoints[name], 0, 2).new_cache(1, 16, 1)

    of_one = sum(state.conv.nbytes + state.delta.nbytes for state in cache.states)
    assert of_one == state_bytes(checkpoint.config) // 2
    keys = sum(k.nbytes + v.nbytes for k, v in zip(cache.keys, cache.values, strict=True))
    assert keys == 16 * kv_bytes_per_token(checkpoint.config, 4) // 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 6}, "6 query heads do not divide among 4 ranks"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide among 4 ranks"),
        ({"intermediate_size": 90}, "90 inner elements of the MLP do not divide"),
        ({"moe_intermediate_size": 30}, "30 inner elements of an expert do not divide"),
        ({"linear_num_key_heads": 2}, "2 key heads of the delta rule do not divide"),
    ],
)
def test_what_ranks_cannot_share_is_said(
    checkpoints: Mapping[str, Path], changes: dict[str, int], words: str
) -> None:
    config = Checkpoint.open(checkpoints["llama"]).config

    check_divides(config, 4)
    with pytest.raises(Indivisible, match=words):
        check_divides({**config, **changes}, 4)


def test_blocks_are_never_cut(checkpoints: Mapping[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["llama.gguf"])
    name = "blk.0.ffn_down.weight"
    narrow = replace(checkpoint.tensors[name], shape=(64, 32))
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, name: narrow})

    with pytest.raises(Indivisible, match=r"1 blocks of 32 columns of layers.0.mlp.down_proj"):
        weights_of_rank(checkpoint, Sharing(2))


def test_the_first_ranks_hold_one_more_of_blocks_that_do_not_divide(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base, sizes = tmp_path_factory.mktemp("uneven"), {**ROOMY, "intermediate_size": 96}
    inner = {"moe_intermediate_size": 224, "shared_expert_intermediate_size": 160}
    saved_model(base / "llama", "llama", **sizes)
    write_gguf(base / "llama.gguf", random_model("llama", **sizes), "Q8_0")
    write_gguf(base / "moe.gguf", random_model("qwen3_moe", **sizes, **inner), "Q4_0")
    write_hybrid_gguf(base / "next.gguf", random_hybrid("qwen3_next", **ROOMY, **inner), "Q8_0")

    quants = {"llama": "q4_1", "llama.gguf": None, "moe.gguf": None, "next.gguf": None}
    for name, quant in quants.items():
        checkpoint = Checkpoint.open(base / name)
        expected = [weights_of_rank(checkpoint, Sharing(2, quant, rank=rank)) for rank in (0, 1)]

        found = [weights_bytes(held(base / name, rank, 2, quant=quant)) for rank in (0, 1)]

        assert found == expected
        assert found[0] > found[1]
        assert weights_of_rank(checkpoint, Sharing(2, quant)) == found[0]


def test_inner_sizes_of_whole_blocks_need_not_divide(checkpoints: Mapping[str, Path]) -> None:
    config = Checkpoint.open(checkpoints["llama"]).config | {"intermediate_size": 3 * 37}

    check_divides(config, 2, block=37)
    with pytest.raises(Indivisible, match="111 inner elements of the MLP do not divide"):
        check_divides(config, 4, block=37)
    with pytest.raises(Indivisible, match="111 key heads of the delta rule do not divide"):
        check_divides(config | {"linear_num_key_heads": 111}, 2, block=37)


def test_what_nobody_has_heard_of_is_held_by_every_rank() -> None:
    assert split_of("layers.0.self_attn.k_proj.bias") == "kv_heads"
    assert split_of("layers.0.mlp.experts.7.down_proj.weight") == "inner_columns"
    assert split_of("layers.0.self_attn.o_proj.weight") == "columns"
    assert split_of("layers.0.linear_attn.A_log") == "rows"
    assert split_of("layers.0.novelty.weight") == "whole"


def test_the_copy_of_a_tied_head_is_not_counted(checkpoints: Mapping[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["tied"])
    copy = {"lm_head.weight": checkpoint.tensors["model.embed_tokens.weight"]}
    copied = replace(checkpoint, tensors={**checkpoint.tensors, **copy})

    assert weights_of_rank(copied, Sharing(2)) == weights_of_rank(checkpoint, Sharing(2))
