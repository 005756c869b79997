"""A completion may begin with its prompt, and tell its log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from completion_calls import TEXT, asked, events, streamed, text
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.echo import echo_of
from cortex.runtime.tokenizer import Tokenizer
from fake_node import FakeNode, found, posting, record, says, tiny_text
from tiny_text import SPECIALS, trained, with_bos

SCORE, TOP = int(Flag.SCORE), int(Flag.TOP)
ENDED = record(0, Flag.LENGTH)


def scored(token_ids: Sequence[int], tops: int = 1) -> list[list[TokenRecord]]:
    """Return what a device says of a prompt, token by token, and that nothing was cached."""
    batches = [
        [
            *(TokenRecord(1, token + rank, -1.0 * rank, TOP, rank) for rank in range(1, tops + 1)),
            TokenRecord(1, token, -0.25, SCORE),
        ]
        for token in token_ids[1:]
    ]
    return [*batches, [found(0)]]


def echoing(prompt: Any = "The fox", **more: Any) -> dict[str, Any]:
    return text(prompt=prompt, echo=True, **more)


# the text and its tokens


@pytest.mark.parametrize("prompt", ["The fox", "naïve 😀 <|im_end|>", "\n"])
def test_offsets_are_those_of_the_tokens_texts(prompt: str) -> None:
    side = tiny_text()
    token_ids = side.text_prompt(prompt)

    of_text = echo_of(prompt, token_ids, side.token_bytes)
    of_ids = echo_of(token_ids, token_ids, side.token_bytes)

    assert of_text == of_ids
    assert of_text.text == prompt
    for at, token_id in zip(of_text.offsets, token_ids, strict=True):
        said = side.token_bytes(token_id).decode(errors="ignore")
        assert not said or prompt.startswith(said, at)


def test_a_token_that_the_tokeniser_puts_before_a_text_has_no_text() -> None:
    tokenizer = Tokenizer(with_bos(trained("llama-bpe")), {})
    token_ids = tokenizer.encode("The fox", with_bos=True)

    of_text = echo_of("The fox", token_ids, tokenizer.bytes_of)
    of_ids = echo_of(token_ids, token_ids, tokenizer.bytes_of)

    assert (of_text.text, of_text.offsets[:2]) == ("The fox", [0, 0])
    assert of_ids.text == SPECIALS[0] + "The fox"


# over HTTP


@pytest.mark.parametrize("is_ids", [False, True])
async def test_an_answer_begins_with_its_prompt(is_ids: bool) -> None:
    node = FakeNode("m")
    node.script = [[found(3)], *says(" runs.")]
    token_ids = tiny_text().text_prompt("The fox")

    _, body = await asked(node, TEXT, echoing(prompt=token_ids if is_ids else "The fox"))

    assert body["choices"][0]["text"] == "The fox runs."
    assert body["usage"]["prompt_tokens"] == len(token_ids)
    assert body["usage"]["completion_tokens"] == len(says(" runs."))


async def test_of_no_tokens_only_the_prompt_is_said() -> None:
    node = FakeNode("m")
    node.script = [[found(0), ENDED]]

    _, body = await asked(node, TEXT, echoing(max_tokens=0))

    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The fox", "length")
    assert body["usage"]["completion_tokens"] == 0


async def test_a_stop_string_in_the_prompt_ends_nothing() -> None:
    node = FakeNode("m")
    node.script = [[found(0)], *says(" runs, fox.")]

    _, body = await asked(node, TEXT, echoing(stop="fox"))

    [choice] = body["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("The fox runs, ", "fox")


async def test_a_stream_begins_with_the_prompt() -> None:
    node = FakeNode("m")
    node.script = [[found(0)], *says(" runs.")]

    chunks = events(await streamed(node, TEXT, echoing(n=2)))

    for index in (0, 1):
        said = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index]
        assert said[:2] == ["", "The fox"]
        assert "".join(said) == "The fox runs."


async def test_the_prompts_tokens_have_log_probabilities_but_the_first() -> None:
    node, token_ids = FakeNode("m"), tiny_text().text_prompt("The fox")
    node.script = [*scored(token_ids), *says(" runs.", finish=Flag.LENGTH)]

    _, body = await asked(node, TEXT, echoing(logprobs=1))

    said = body["choices"][0]["logprobs"]
    count = len(token_ids)
    assert "".join(said["tokens"]) == body["choices"][0]["text"] == "The fox runs."
    assert said["token_logprobs"][:count] == [None, *[-0.25] * (count - 1)]
    assert said["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in said["top_logprobs"][1:count])
    for at, token in zip(said["text_offset"], said["tokens"], strict=True):
        assert "The fox runs.".startswith(token, at)


async def test_a_prompt_that_only_is_scored_says_nothing_else() -> None:
    node, token_ids = FakeNode("m"), tiny_text().text_prompt("The fox")
    node.script = [*scored(token_ids), [ENDED]]

    _, body = await asked(node, TEXT, echoing(logprobs=0, max_tokens=0))

    [choice] = body["choices"]
    assert choice["text"] == "The fox"
    assert len(choice["logprobs"]["tokens"]) == len(token_ids)
    assert node.asked[0][2].prompt_logprobs == 0


async def test_a_stream_tells_the_prompts_log_probabilities_with_its_text() -> None:
    node, token_ids = FakeNode("m"), tiny_text().text_prompt("The fox")
    node.script = [*scored(token_ids), *says(" runs.", finish=Flag.LENGTH)]
    _, whole = await asked(node, TEXT, echoing(logprobs=1))

    chunks = events(await streamed(node, TEXT, echoing(logprobs=1)))

    parts = [chunk["choices"][0] for chunk in chunks]
    assert parts[1]["text"] == "The fox"
    assert len(parts[1]["logprobs"]["tokens"]) == len(token_ids)
    told = [part["logprobs"] or {} for part in parts]
    for name, expected in whole["choices"][0]["logprobs"].items():
        assert [x for part in told for x in part.get(name, ())] == expected


async def test_an_echo_of_nothing_is_refused() -> None:
    async with posting(FakeNode("m"), TEXT, echoing(prompt="")) as response:
        assert response.status == 400
