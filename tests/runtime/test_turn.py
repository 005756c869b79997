"""Streaming and not streaming say the same, however the tokens arrive."""

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.ipc.errors import MalformedToolCall, NodeFailed
from cortex.ipc.openai import ChatCompletionRequest, CompletionRequest, decode_request
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.completions import Chunk
from cortex.runtime.config import AdmissionConfig
from cortex.runtime.conversation import ChatPrompt
from cortex.runtime.pieces import PlainReader, Reader
from cortex.runtime.reasoning import FORMATS as REASONING
from cortex.runtime.reasoning import ReasoningReader
from cortex.runtime.request_record import RequestRecord
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS as TOOLS
from cortex.runtime.traffic import Traffics
from cortex.runtime.turn import Asked, Turn, answers_of
from fake_node import FakeNode, found, tiny_text

OFFERED: dict[str, Any] = {"look": {"type": "object"}, "go": {"type": "object"}}
FRAGMENTS = [
    "Hello ",
    "naïve 🦊 ",
    "日本",
    "the end",
    "END",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "look", "arguments": {"at": "the fox"}}',
    '{"name": "go", "arguments": {"n": 1, "s": "é\\n"}}',
    '{"name": "go", "arguments": {"n": [',
    '{"name": "fly", "arguments": {}}',
    '{"name": "look", "arguments": oops}',
    "\n",
]


def reader() -> Reader:
    """Return the reader of a model that reasons and calls."""
    calls = ToolCallReader(TOOLS["hermes"], OFFERED)
    return ReasoningReader(REASONING["think"], calls, is_open=False)


def request(is_chat: bool, **more: Any) -> Asked:
    """Return a request for an answer."""
    if is_chat:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **more}
        return decode_request(msgspec.json.encode(body), ChatCompletionRequest)
    return decode_request(
        msgspec.json.encode({"model": "m", "prompt": "x", **more}), CompletionRequest
    )


class Asking:
    """One request, asked afresh as often as one likes."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.is_chat = isinstance(asked, ChatCompletionRequest)
        self.traffic = Traffics(AdmissionConfig()).of(FakeNode("m").models["m"])

    def turn(self) -> Turn:
        """Return a new turn."""
        prompt = ChatPrompt([1], reader if self.is_chat else PlainReader)
        answers = answers_of(self.asked, tiny_text(), prompt, room_tokens=512)
        clock, record = itertools.count().__next__, RequestRecord("r", arrived=0.0)
        return Turn(self.asked, answers, self.traffic, record, clock, reasons=True)

    def whole(self, batches: list[list[TokenRecord]]) -> dict[str, Any]:
        """Return the choice, and the usage, of an answer that does not stream."""
        turn = self.turn()
        for batch in batches:
            turn.gather(0, batch)
        body = plain(turn.whole())
        [choice] = body["choices"]
        if not any((choice["logprobs"] or {}).values()):
            choice["logprobs"] = None  # of an answer without tokens a stream has no place to tell
        return {**choice, "usage": body["usage"]}

    def streamed(self, batches: list[list[TokenRecord]]) -> dict[str, Any]:
        """Return the same, put together from a stream."""
        turn = self.turn()
        choice: dict[str, Any] = {"index": 0, "text": "", "message": empty_message()}
        for chunk in self._chunks(turn, batches):
            add(choice, chunk["choices"][0])
        if not choice["message"].get("tool_calls"):
            choice["message"]["content"] = choice["message"]["content"] or ""
        del choice["message" if "text" in plain(turn.objects.opening(0))["choices"][0] else "text"]
        return {"logprobs": None, **choice, "usage": plain(turn.usage)}

    def _chunks(self, turn: Turn, batches: list[list[TokenRecord]]) -> Any:
        for batch in batches:
            yield from map(plain, turn.chunks(0, batch))
        turn.refuse_unfinished()


def plain(said: Chunk) -> dict[str, Any]:
    """Return it as a client reads it."""
    body: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(said))
    return body


def empty_message() -> dict[str, Any]:
    return {"role": "assistant", "content": None, "refusal": None, "annotations": []}


def add(choice: dict[str, Any], chunk: dict[str, Any]) -> None:
    """Add a chunk to what came before, as SDKs do."""
    delta, message = chunk.get("delta", {}), choice["message"]
    choice["text"] += chunk.get("text", "")
    for name in ("content", "reasoning_content"):
        if name in delta:
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls", []):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            assert call["index"] == len(calls)
            assert call["function"]["arguments"] == ""
            calls.append({name: call[name] for name in ("id", "function", "type")})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    for name, values in (chunk["logprobs"] or {}).items():
        so_far = choice.setdefault("logprobs", {})
        so_far[name] = values if values is None else so_far.get(name, []) + values
    choice |= {name: chunk[name] for name in ("finish_reason", "stop_reason") if chunk.get(name)}


def records_of(text: str, finish: Flag) -> list[TokenRecord]:
    """Return the records of *text* with log probabilities, two likeliest tokens each."""
    side = tiny_text()
    records: list[TokenRecord] = []
    for at, token in enumerate(side.text_prompt(text) if text else []):
        logprob = -(at % 64 + 1) / 8
        records += [
            TokenRecord(1, token, logprob, int(Flag.TOP)),
            TokenRecord(1, token + 1, logprob - 1, int(Flag.TOP)),
            TokenRecord(1, token, logprob, int(Flag.TOKEN)),
        ]
    if finish is Flag.LENGTH and records:
        records[-1] = records[-1]._replace(flags=int(Flag.TOKEN | finish))
        return records
    return [*records, TokenRecord(1, side.stop_token_ids[0], -0.5, int(Flag.TOKEN | Flag.STOP))]


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """Return *choice* without what is made up for each answer."""
    for call in choice.get("message", {}).get("tool_calls", []):
        call["id"] = "call"
    return choice


@st.composite
def split(draw: st.DrawFn, records: list[TokenRecord]) -> list[list[TokenRecord]]:
    """Draw batches of *records*, cut anywhere, as a full ring does."""
    cuts = sorted(draw(st.sets(st.sampled_from(range(len(records))))))
    edges = [0, *cuts, len(records)]
    return [records[a:b] for a, b in itertools.pairwise(edges) if a < b]


TOOLS_OFFERED = [{"type": "function", "function": {"name": name}} for name in OFFERED]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stop": "the end"},
    {"stop": ["END", "fox", "🦊"]},
    {"logprobs": True, "top_logprobs": 2},
    {"logprobs": True, "stop": ["the end", "日本"]},
    {"parallel_tool_calls": False},
    {"tool_choice": "required", "tools": TOOLS_OFFERED, "stop": "fox"},
]


@given(
    data=st.data(),
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    finish=st.sampled_from([Flag.STOP, Flag.LENGTH]),
    options=st.sampled_from(OPTIONS),
)
def test_a_chat_is_the_same_streamed_or_not_and_however_its_tokens_arrive(
    data: st.DataObject, text: str, finish: Flag, options: dict[str, Any]
) -> None:
    asking = Asking(request(is_chat=True, **options))
    records = records_of(text, finish)

    whole = without_ids(asking.whole([records]))

    assert without_ids(asking.whole(data.draw(split(records)))) == whole
    one_by_one = [[record] for record in records]
    try:
        streamed = without_ids(asking.streamed(data.draw(split(records))))
    except MalformedToolCall:
        with pytest.raises(MalformedToolCall):
            asking.streamed(one_by_one)
        assert '"arguments"' in whole["message"]["content"]
        return
    assert without_ids(asking.streamed(one_by_one)) == streamed
    assert streamed == whole


@given(
    data=st.data(),
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join),
    finish=st.sampled_from([Flag.STOP, Flag.LENGTH]),
    options=st.sampled_from([{}, {"stop": ["the end", "fox"]}, {"logprobs": 2, "stop": "日本"}]),
)
def test_a_completion_is_the_same_streamed_or_not_and_however_its_tokens_arrive(
    data: st.DataObject, text: str, finish: Flag, options: dict[str, Any]
) -> None:
    asking = Asking(request(is_chat=False, **options))
    records = records_of(text, finish)

    whole = asking.whole([records])

    assert asking.whole(data.draw(split(records))) == whole
    assert asking.streamed(data.draw(split(records))) == whole
    assert text.startswith(whole["text"])


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ('<tool_call>\n{"name": "look", "arguments": {"at": "the ', '{"at": "the '),
        ('<tool_call>\n{"name": "look", "argum', None),
        ('<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call', "{}"),
    ],
)
@pytest.mark.parametrize(("reason", "more"), [("length", ""), ("stop", "fox")])
def test_a_demanded_call_that_was_cut_shows_no_markup(
    said: str, arguments: str | None, reason: str, more: str
) -> None:
    options = {"tool_choice": "required", "tools": TOOLS_OFFERED}
    asking = Asking(request(is_chat=True, stop="fox", **options))
    records = records_of(said + more, Flag.LENGTH)

    whole = without_ids(asking.whole([records]))

    assert without_ids(asking.streamed([[record] for record in records])) == whole
    calls = whole["message"].get("tool_calls", [])
    assert [call["function"]["arguments"] for call in calls] == [arguments] * len(calls)
    assert bool(calls) == (arguments is not None)
    assert not whole["message"]["content"]
    assert whole["finish_reason"] == (
        "tool_calls" if (arguments, more) == ("{}", "fox") else reason
    )


def test_an_answer_that_just_stops_is_none() -> None:
    asking = Asking(request(is_chat=True))
    records = records_of("Hello", Flag.STOP)[:-1]

    with pytest.raises(NodeFailed):
        asking.whole([records])
    with pytest.raises(NodeFailed):
        asking.streamed([records])


def test_the_tokens_of_an_answer_are_counted() -> None:
    asking = Asking(request(is_chat=True))
    records = records_of("Hello there", Flag.STOP)
    turn = asking.turn()

    turn.gather(0, records)

    tokens = sum(bool(record.flags & Flag.TOKEN) for record in records)
    assert turn.record.completion_tokens == tokens


def test_what_the_prefix_cache_had_was_not_computed() -> None:
    asking = Asking(request(is_chat=True))
    turn = asking.turn()  # its clock ticks once each time it is read
    turn.record.prompt_tokens = 100

    turn.gather(0, [found(90), *records_of("Hello", Flag.STOP)])

    assert turn.record.cached_tokens == 90
    assert asking.traffic.rates.prefill == 10.0
