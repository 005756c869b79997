"""Each architecture against transformers, and what all promise of batches and chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cortex.models.kernels import cpu
from cortex.models.loaded_model import LoadedModel
from tiny_models import (
    Player,
    loaded,
    random_model,
    reference_logits,
    saved_model,
    some_tokens,
    write_gguf,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
ROTARY_BASE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn with its own numbers": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
        "beta_fast": 8.0,
    },
}
"""Rotary positions that are scaled so early that 30 tokens tell."""

VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one head per key": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "explicit head size": {"head_dim": 32},
    "sizes that fill no vector": {"hidden_size": 40, "intermediate_size": 51, "head_dim": 10},
    "another theta": ROTARY_BASE,
    "three queries to a key": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "a window that is not used": {"use_sliding_window": False, "sliding_window": 3},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "weights that do not sum to 1": {"norm_topk_prob": False},
    "one expert per token": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8},
    "experts that fill no vector": {"moe_intermediate_size": 20},
    "a dense layer": {"mlp_only_layers": [1]},
    "every second layer sparse": {"decoder_sparse_step": 2},
}
MODELS = [
    *[("llama", variant) for variant in VARIANTS if "window" not in variant],
    *[("qwen2", variant) for variant in VARIANTS],
    *[("qwen3", variant) for variant in VARIANTS],
    *[("qwen3_moe", variant) for variant in ("untied", "tied", "sizes that fill no vector")],
    *[("qwen3_moe", variant) for variant in MIXTURES],  # its attention is that of qwen3
]
SCALINGS = [
    (model_type, source, list(SCALED)[(at + shift) % len(SCALED)])
    for at, model_type in enumerate(ARCHITECTURES)
    for shift, source in enumerate(("safetensors", "gguf"))
]
"""Each architecture from both sources, and each scaling from both."""
KINDS = [
    (model_type, kind, (at + shift) % 2 == 0)
    for at, model_type in enumerate(ARCHITECTURES)
    for shift, kind in enumerate(("F32", "F16", "Q5_0", "Q8_0"))
]
"""Each architecture in every kind, of both tied and not."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("tiny")
    saved_model(directory, request.param)
    return loaded(directory)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "kernels", lambda: None)


@pytest.mark.parametrize(("model_type", "variant"), MODELS)
def test_logits_equal_those_of_transformers(tmp_path: Path, model_type: str, variant: str) -> None:
    reference = saved_model(tmp_path, model_type, **(VARIANTS | MIXTURES)[variant])
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("model_type", "source", "scaling"), SCALINGS)
def test_scaled_rotary_positions_give_the_logits_of_transformers(
    tmp_path: Path, model_type: str, source: str, scaling: str
) -> None:
    reference = random_model(model_type, rope_parameters=SCALED[scaling])
    if source == "gguf":
        write_gguf(tmp_path / "tiny.gguf", reference, "F32")
    else:
        reference.save_pretrained(tmp_path)
    tokens = some_tokens(30)

    path = tmp_path / "tiny.gguf" if source == "gguf" else tmp_path
    logits = Player(loaded(path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("scaling", SCALED)
def test_a_checkpoint_of_transformers_4_scales_its_rotary_positions_too(
    tmp_path: Path, scaling: str
) -> None:
    reference = saved_model(tmp_path, "llama", rope_parameters=SCALED[scaling])
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    rope["type"] = rope.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [{"head_dim": 32}, {"head_dim": 24, "num_attention_heads": 8}])
def test_mistral_without_a_window_is_llama(tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = saved_model(tmp_path, "mistral", sliding_window=None, **shape)
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "kind", "tied"), KINDS)
def test_a_gguf_file_gives_the_logits_of_transformers_on_its_values(
    tmp_path: Path, model_type: str, kind: str, *, tied: bool
) -> None:
    reference = random_model(model_type, tie_word_embeddings=tied, **ROTARY_BASE)
    write_gguf(tmp_path / "tiny.gguf", reference, kind)
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path / "tiny.gguf")).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_checkpoints_compute_in_float32_on_a_cpu(
    tmp_path: Path, dtype: torch.dtype, model_type: str
) -> None:
    random_model(model_type).to(dtype).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = some_tokens(20)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_equal_those_of_transformers_without_kernels_too(
    tmp_path: Path, model_type: str
) -> None:
    reference = saved_model(tmp_path, model_type)
    tokens = some_tokens(30)
    player = Player(loaded(tmp_path))

    logits = torch.cat([player.step(a=tokens[:17])["a"], player.step(a=tokens[17:])["a"]])

    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_width_is_taken_at_its_word(
    tmp_path: Path, dtype: torch.dtype, model_type: str
) -> None:
    reference = saved_model(tmp_path, model_type)
    tokens = some_tokens(30)
    model = loaded(tmp_path, dtype=str(dtype).removeprefix("torch."))
    player = Player(model)

    logits = player.step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    assert model.kv_dtype == player.cache.keys[0].dtype == dtype
    assert logits.dtype == torch.float32
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_hidden_states_are_those_behind_the_final_norm(
    tmp_path: Path, model_type: str, dtype: str
) -> None:
    reference = saved_model(tmp_path, model_type)
    tokens = some_tokens(30)
    model = loaded(tmp_path, dtype=dtype)
    batch = Player(model).batch({"a": tokens})
    object.__setattr__(batch, "sampled", torch.tensor([29]))

    with torch.inference_mode():
        hidden = model.module.hidden(batch)
        expected = reference.model(torch.tensor([tokens])).last_hidden_state[0]

    assert hidden.dtype == torch.float32
    assert torch.cosine_similarity(hidden.flatten(), expected.flatten(), dim=0) > 0.999
    if dtype == "float32":
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_do_not_depend_on_company_or_chunks(tiny: LoadedModel) -> None:
    tokens = some_tokens(40)
    alone, player = Player(tiny), Player(tiny)
    with torch.inference_mode():
        whole = tiny.module.hidden(alone.batch({"a": tokens}))

        first = tiny.module.hidden(player.batch({"a": tokens[:9], "b": some_tokens(20, seed=1)}))
        second = tiny.module.hidden(player.batch({"b": [7], "a": tokens[9:]}))

    assert torch.equal(torch.cat([first[:9], second[1:]]), whole)


def test_prefill_then_decode_equals_prefill_bitwise(tiny: LoadedModel) -> None:
    tokens = some_tokens(40)
    whole = Player(tiny).step(a=tokens)["a"]
    player = Player(tiny)

    steps = [player.step(a=tokens[:25])["a"]]
    steps += [player.step(a=[token])["a"] for token in tokens[25:]]

    assert torch.equal(torch.cat(steps), whole)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_no_chunking_changes_a_bit(tiny: LoadedModel, sizes: list[int]) -> None:
    tokens = some_tokens(sum(sizes))
    whole = Player(tiny, blocks=128).step(a=tokens)["a"]
    player = Player(tiny, blocks=128)

    chunks = [player.step(a=tokens[sum(sizes[:i]) :][:n])["a"] for i, n in enumerate(sizes)]

    assert torch.equal(torch.cat(chunks), whole)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=7))
def test_a_ragged_batch_equals_its_sequences_one_by_one_bitwise(
    tiny: LoadedModel, sizes: list[int]
) -> None:
    prompts = {f"s{i}": some_tokens(size, seed=i) for i, size in enumerate(sizes)}
    together = Player(tiny)
    first = together.step(**prompts)

    second = together.step(**{name: [7] for name in prompts})

    for name, prompt in prompts.items():
        alone = Player(tiny)
        assert torch.equal(alone.step(a=prompt)["a"], first[name])
        assert torch.equal(alone.step(a=[7])["a"], second[name])


def test_a_prompt_may_join_while_others_decode_without_changing_a_bit(tiny: LoadedModel) -> None:
    player = Player(tiny)
    player.step(a=some_tokens(11))

    joined = player.step(a=[3], b=some_tokens(33, seed=2))

    alone = Player(tiny)
    alone.step(a=some_tokens(11))
    assert torch.equal(alone.step(a=[3])["a"], joined["a"])
    assert torch.equal(Player(tiny).step(b=some_tokens(33, seed=2))["b"], joined["b"])


def test_the_number_of_threads_does_not_change_a_bit(tiny: LoadedModel) -> None:
    tokens, threads = some_tokens(50), torch.get_num_threads()

    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(Player(tiny).step(a=tokens)["a"])
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_only_the_sampled_tokens_get_logits(tiny: LoadedModel) -> None:
    player = Player(tiny)
    batch = player.batch({"a": some_tokens(9)})
    everything = tiny.module(batch)
    object.__setattr__(batch, "sampled", torch.tensor([8, 2]))

    logits = tiny.module(batch)

    assert torch.equal(logits, everything[[8, 2]])


def test_a_step_that_samples_nothing_has_no_logits(tiny: LoadedModel) -> None:
    batch = Player(tiny).batch({"a": some_tokens(9)})
    object.__setattr__(batch, "sampled", torch.tensor([], dtype=torch.int64))

    assert tiny.module(batch).shape == (0, tiny.vocab_size)


def test_a_token_outside_the_vocabulary_is_an_error(tiny: LoadedModel) -> None:
    with pytest.raises(IndexError):
        Player(tiny).step(a=[tiny.vocab_size])
