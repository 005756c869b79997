"""Llama against transformers, and what it promises of batches and chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from cortex.models.kernels import cpu
from cortex.models.llama import LlamaConfig
from cortex.models.weights import LoadedModel
from tiny_models import Player, loaded, random_llama, reference_logits, saved_llama, some_tokens

VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one head per key": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "explicit head size": {"head_dim": 32},
    "sizes that fill no vector": {"hidden_size": 40, "intermediate_size": 51, "head_dim": 10},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("tiny")
    saved_llama(directory)
    return loaded(directory)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "kernels", lambda: None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, variant: str) -> None:
    reference = saved_llama(tmp_path, **VARIANTS[variant])
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_checkpoints_compute_in_float32_on_a_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    random_llama().to(dtype).save_pretrained(tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = some_tokens(20)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_kernels")
def test_logits_equal_those_of_transformers_without_kernels_too(tmp_path: Path) -> None:
    reference = saved_llama(tmp_path)
    tokens = some_tokens(30)
    player = Player(loaded(tmp_path))

    logits = torch.cat([player.step(a=tokens[:17])["a"], player.step(a=tokens[17:])["a"]])

    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


def test_a_16_bit_width_is_taken_at_its_word(tmp_path: Path) -> None:
    reference = saved_llama(tmp_path)
    tokens = some_tokens(30)
    model = loaded(tmp_path, dtype="bfloat16")
    player = Player(model)

    logits = player.step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    assert model.kv_dtype == player.cache.keys[0].dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.999


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


CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def test_config_json_may_leave_out_what_transformers_defaults() -> None:
    config = LlamaConfig.from_json(CONFIG)

    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert (config.rope_theta, config.tie_word_embeddings) == (10000.0, False)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
)
def test_both_spellings_of_the_rotary_base_are_read(rope: dict[str, Any]) -> None:
    assert LlamaConfig.from_json({**CONFIG, **rope}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"head_dim": 15}, "odd"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rms_norm_eps": "tiny"}, "tiny"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "no object"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_a_variant_that_is_not_implemented_is_refused(variant: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LlamaConfig.from_json({**CONFIG, **variant})
