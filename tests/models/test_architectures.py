"""Each architecture against transformers, and what all promise of batches and chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cortex.models.kernels import cpu
from cortex.models.weights import LoadedModel
from tiny_models import (
    Player,
    loaded,
    random_model,
    reference_logits,
    saved_model,
    some_tokens,
    write_gguf,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROTARY_BASE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one head per key": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "explicit head size": {"head_dim": 32},
    "sizes that fill no vector": {"hidden_size": 40, "intermediate_size": 51, "head_dim": 10},
    "another theta": ROTARY_BASE,
    "a window that is not used": {"use_sliding_window": False, "sliding_window": 3},
}
MODELS = [
    *[("llama", variant) for variant in VARIANTS if "window" not in variant],
    *[("qwen2", variant) for variant in VARIANTS],
    *[("qwen3", variant) for variant in VARIANTS],
]


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
    reference = saved_model(tmp_path, model_type, **VARIANTS[variant])
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_mistral_without_a_window_is_llama(tmp_path: Path) -> None:
    reference = saved_model(tmp_path, "mistral", sliding_window=None, head_dim=32)
    tokens = some_tokens(30)

    logits = Player(loaded(tmp_path)).step(a=tokens)["a"]

    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
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

    tolerance = 1e-4 if dtype == "float32" else 0.2
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, expected, rtol=tolerance, atol=tolerance)


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
