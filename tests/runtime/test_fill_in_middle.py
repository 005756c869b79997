"""A suffix is honoured where the tokeniser has tokens for it, and else refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from completion_calls import TEXT, asked, text
from cortex.ipc.errors import UnsupportedParameter
from cortex.runtime.fill_in_middle import ENDS, FAMILIES, FillMarks, marks_of
from cortex.runtime.text import TextSide
from cortex.runtime.tokenizer import Tokenizer
from fake_node import FakeNode, FakeText, says
from tiny_text import TINY_LLAMA, metadata_of, trained, write_gguf

QWEN = FAMILIES[0]


def side_with(*tokens: str) -> TextSide:
    backend = trained("smollm")
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    side: TextSide = FakeText(tokenizer=Tokenizer(backend, {})).side
    return side


def gguf_side(path: Path, **more: Any) -> TextSide:
    metadata = TINY_LLAMA | metadata_of(trained("smollm"), "smollm", **more)
    return TextSide.from_checkpoint(write_gguf(path / "tiny.gguf", metadata))


def shown(side: TextSide, token_ids: list[int]) -> list[str]:
    """Return the texts of the tokens, those of plain text joined."""
    parts = [""]
    for token_id in token_ids:
        said = side.token_bytes(token_id).decode()
        if said in side.tokenizer.markers:
            parts += [said, ""]
        else:
            parts[-1] += said
    return [part for part in parts if part]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_a_family_is_known_by_its_tokens(family: FillMarks) -> None:
    side = side_with(*family.tokens)

    prompt = side.fill_prompt("def f(", ")")

    said = shown(side, prompt.token_ids)
    expected = {family.prefix: "def f(", family.suffix: ")"}
    assert {mark: said[said.index(mark) + 1] for mark in expected} == expected
    assert said[0] == (family.suffix if family.is_suffix_first else family.prefix)
    assert not family.middle or said[-1] == family.middle
    assert {side.tokenizer.id_of(token) for token in family.tokens} <= set(prompt.end_ids)


def test_what_comes_behind_a_filled_gap_ends_it() -> None:
    side = side_with(*QWEN.tokens, "<|fim_pad|>", "<|file_sep|>")

    ends = {side.token_bytes(i).decode() for i in side.fill_prompt("a", "b").end_ids}

    assert ends == {*QWEN.tokens, "<|fim_pad|>", "<|file_sep|>", "<|endoftext|>"}
    assert ends & set(ENDS)


def test_all_tokens_of_a_family_have_to_be_there() -> None:
    assert marks_of({"<|fim_prefix|>", "<|fim_suffix|>"}) is None
    assert marks_of(set(QWEN.tokens), declared=("x", "y", "z")) is QWEN, "they are no tokens"


def test_what_a_file_declares_comes_first_in_the_order_of_its_family() -> None:
    mine, seed = ("<a>", "<b>", "<c>"), FAMILIES[4]

    assert marks_of({*mine, *QWEN.tokens}, declared=mine) == FillMarks(*mine)
    assert marks_of({*seed.tokens, *QWEN.tokens}, declared=seed.tokens) is seed  # type: ignore[arg-type] # three


@pytest.mark.parametrize(
    "names", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")]
)
def test_a_gguf_file_declares_its_tokens(tmp_path: Path, names: tuple[str, str, str]) -> None:
    plain = trained("smollm")
    marks = ["<|im_start|>", "<|im_end|>", "<think>"]
    declared = {
        f"{name}_token_id": plain.token_to_id(mark) for name, mark in zip(names, marks, strict=True)
    }

    side = gguf_side(tmp_path, **declared)

    said = shown(side, side.fill_prompt("a", "b").token_ids)
    assert said == ["<|im_start|>", "a", "<|im_end|>", "b", "<think>"]


def test_a_model_without_the_tokens_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedParameter, match="cannot fill in") as refused:
        gguf_side(tmp_path).fill_prompt("a", "b")

    assert refused.value.param == "suffix"


async def test_a_suffix_is_part_of_the_prompt_and_its_ends_are_ends() -> None:
    node = FakeNode("m")
    node.models["m"].text = side = side_with(*QWEN.tokens)
    node.script = says("x")

    status, body = await asked(node, TEXT, text(prompt="f(", suffix=")"))

    assert (status, body["choices"][0]["text"]) == (200, "x")
    _, token_ids, sampling = node.asked[0]
    assert shown(side, token_ids) == ["<|fim_prefix|>", "f(", "<|fim_suffix|>", ")", QWEN.middle]
    assert side.tokenizer.id_of("<|fim_prefix|>") in sampling.stop_token_ids


async def test_a_suffix_may_follow_nothing() -> None:
    node = FakeNode("m")
    node.models["m"].text = side_with(*QWEN.tokens)

    status, _ = await asked(node, TEXT, text(prompt="", suffix=")"))

    assert status == 200


async def test_a_suffix_behind_token_ids_is_refused() -> None:
    node = FakeNode("m")
    node.models["m"].text = side_with(*QWEN.tokens)

    status, body = await asked(node, TEXT, text(prompt=[5, 6], suffix=")"))

    assert (status, body["error"]["param"]) == (400, "prompt")


async def test_a_suffix_that_the_model_cannot_use_is_refused_in_words() -> None:
    status, body = await asked(FakeNode("m"), TEXT, text(suffix=")"))

    assert (status, body["error"]["code"]) == (400, "unsupported_parameter")
    assert body["error"]["param"] == "suffix"
