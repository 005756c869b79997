"""One answer: records to pieces, however they arrive; how it ended; log probabilities with it."""

from typing import Any

import pytest

from cortex.ipc.errors import NodeFailed
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.answer import Answer, Reading, Said
from cortex.runtime.detokenizer import StopStrings
from cortex.runtime.logprobs import Logprobs
from cortex.runtime.pieces import (
    CallArguments,
    CallBegins,
    CallMalformed,
    Piece,
    PlainReader,
    Reasoning,
    Text,
)
from cortex.runtime.reasoning import FORMATS as REASONING
from cortex.runtime.reasoning import ReasoningReader
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS as TOOLS
from fake_node import record, says, tiny_text

OFFERED: dict[str, Any] = {"look": {"type": "object"}, "go": {"type": "object"}}


def tools() -> ToolCallReader:
    return ToolCallReader(TOOLS["hermes"], OFFERED)


def call(name: str, arguments: str) -> str:
    """Return a call in the format of Hermes."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'


def answer(reader: Any = None, stop: str = "", **more: Any) -> Answer:
    """Return an answer that is read by *reader*."""
    detokenizer = tiny_text().detokenizer()
    return Answer(Reading(detokenizer, StopStrings([stop]), reader or PlainReader(), **more))


def read(of: Answer, text: str, finish: Flag | None = Flag.STOP) -> list[Piece]:
    """Return the pieces of *text*, token by token, until the answer has ended."""
    pieces: list[Piece] = []
    for batch in says(text, finish):
        if of.finish_reason is None:
            pieces += of.add(batch)
    return pieces


def joined(pieces: list[Piece]) -> list[Any]:
    """Return kind and text of *pieces*, those of one kind joined."""
    said: list[Any] = []
    for piece in pieces:
        match piece:
            case CallBegins(index, _, name):
                said.append(["call", index, name, ""])
            case CallArguments(index, text):
                assert said[-1][:2] == ["call", index]
                said[-1][3] += text
            case CallMalformed(index, block):
                said.append(["malformed", index, block])
            case Text(text) | Reasoning(text):
                kind = type(piece).__name__
                if said and said[-1][0] == kind:
                    said[-1][1] += text
                else:
                    said.append([kind, text])
    return said


def test_an_answer_with_a_call_ends_with_tool_calls() -> None:
    of = answer(tools())

    pieces = read(of, "Wait. " + call("look", '{"at": 1}'))

    assert joined(pieces) == [["Text", "Wait."], ["call", 0, "look", '{"at": 1}']]
    assert (of.finish_reason, of.calls) == ("tool_calls", 1)


def test_a_call_that_was_taken_back_is_none() -> None:
    of = answer(tools())

    read(of, call("look", '{"at": nothing}'))

    assert (of.finish_reason, of.calls) == ("stop", 0)


def test_an_answer_cut_at_its_limit_within_a_call_has_what_came_of_it() -> None:
    of = answer(ReasoningReader(REASONING["think"], tools(), is_open=False))

    pieces = read(
        of, call("look", "{}") + '<tool_call>{"name": "go", "arguments": {"to', Flag.LENGTH
    )

    assert joined(pieces) == [["call", 0, "look", "{}"], ["call", 1, "go", '{"to']]
    assert (of.finish_reason, of.calls) == ("length", 2)


def test_a_call_that_is_malformed_before_the_cut_was_not_cut() -> None:
    of = answer(tools(), stop="STOP")

    read(of, call("look", "{oh}") + call("go", "{}") + "STOP")

    assert (of.finish_reason, of.calls) == ("tool_calls", 1)


@pytest.mark.parametrize(
    "cut",
    ["<tool", "<tool_call>", '<tool_call>\n{"name": "go", "argu', "<thi", call("go", "{}") + "<t"],
)
@pytest.mark.parametrize(("finish", "stop"), [(Flag.LENGTH, ""), (None, "STOP")])
def test_what_a_cut_leaves_of_a_marker_is_no_text_where_calls_are_demanded(
    cut: str, finish: Flag | None, stop: str
) -> None:
    reader = ReasoningReader(REASONING["think"], tools(), is_open=False)
    of = answer(reader, stop=stop, is_calls_only=True)

    pieces = read(of, cut + stop, finish)

    assert [piece for piece in joined(pieces) if piece[0] == "Text"] == []
    assert of.finish_reason is not None


def test_a_stop_string_within_a_call_cuts_it() -> None:
    of = answer(tools(), stop="STOP")

    read(of, call("look", '{"at": "STOP"}'), finish=None)

    assert (of.finish_reason, of.stop_reason) == ("stop", "STOP")


def test_the_only_call_that_is_wanted_ends_the_answer_where_a_second_would_begin() -> None:
    of = answer(tools(), is_one_call=True)

    pieces = read(of, call("look", "{}") + call("go", "{}"))

    assert joined(pieces) == [["call", 0, "look", "{}"]]
    assert (of.finish_reason, of.calls) == ("tool_calls", 1)


def test_a_second_call_in_the_last_token_of_an_answer_is_not_why_it_ended() -> None:
    of = answer(tools(), is_one_call=True)
    text = call("look", "{}") + '<tool_call>{"name": "go", "arguments": {'

    read(of, text, Flag.LENGTH)

    assert (of.finish_reason, of.calls) == ("tool_calls", 1)


def test_a_call_after_one_that_was_none_is_the_first() -> None:
    of = answer(tools(), is_one_call=True)

    pieces = read(of, call("look", "{oh}") + call("go", "{}"))

    assert [piece.name for piece in pieces if isinstance(piece, CallBegins)] == ["look", "go"]
    assert (of.finish_reason, of.calls) == ("tool_calls", 1)


def test_tokens_behind_the_only_call_do_not_count() -> None:
    at_once, by_one = answer(tools(), is_one_call=True), answer(tools(), is_one_call=True)
    text = call("look", "{}") + call("go", '{"far": true}')

    read(by_one, text)
    at_once.add([token for batch in says(text) for token in batch])

    assert at_once.completion_tokens == by_one.completion_tokens < len(says(text))


def test_tokens_of_reasoning_are_counted_and_its_end_counts_with_what_follows() -> None:
    form = REASONING["think"]
    of = answer(ReasoningReader(form, PlainReader(), is_open=False))

    pieces = read(of, "<think>I see.</think>Yes.")

    assert joined(pieces) == [["Reasoning", "I see."], ["Text", "Yes."]]
    assert of.reasoning_tokens == len(says("<think>I see.", None))
    assert of.completion_tokens == len(says("<think>I see.</think>Yes."))


def test_what_begins_a_call_right_behind_the_reasoning_is_none() -> None:
    of = answer(ReasoningReader(REASONING["think"], tools(), is_open=True))

    read(of, "Hm.</think>" + call("look", "{}"))

    assert of.reasoning_tokens == len(says("Hm.", None))


def test_an_answer_without_reasoning_has_no_reasoning_tokens() -> None:
    of = answer(ReasoningReader(REASONING["think"], PlainReader(), is_open=False))

    read(of, "Just text.")

    assert of.reasoning_tokens == 0


def test_a_token_that_the_client_named_is_why_it_ended() -> None:
    of = answer(named_stops={5, 6})

    of.add([record(5, Flag.TOKEN | Flag.STOP)])

    assert (of.finish_reason, of.stop_reason, of.completion_tokens) == ("stop", 5, 1)


def test_an_end_token_of_the_model_is_no_reason_to_name() -> None:
    of = answer(named_stops={6})

    of.add([record(5, Flag.TOKEN | Flag.STOP)])

    assert (of.finish_reason, of.stop_reason) == ("stop", None)


def test_what_somebody_else_cancelled_is_a_fault() -> None:
    with pytest.raises(NodeFailed, match="cancelled"):
        answer().add([record(0, Flag.CANCELLED)])


def test_pieces_of_one_kind_are_joined_within_a_batch() -> None:
    of = answer(tools())
    text = "One two. " + call("look", '{"at": [1, 2, 3]}')

    pieces = of.add([token for batch in says(text) for token in batch])

    assert [type(piece) for piece in pieces] == [Text, CallBegins, CallArguments]


def test_what_was_said_in_all_shows_a_call_that_is_none_as_text() -> None:
    said = Said(is_scored=False)
    of = answer(ReasoningReader(REASONING["think"], tools(), is_open=True))

    said.add(read(of, "Hm.</think>So " + call("look", "{oh}") + call("go", '{"n": 1}')), [])

    assert said.reasoning == "Hm."
    assert said.text.startswith("So")
    assert "{oh}" in said.text
    assert [(made.function.name, made.function.arguments) for made in said.calls] == [
        ("go", '{"n": 1}')
    ]


def scored(text: str, tops: int = 0) -> list[TokenRecord]:
    """Return the records of *text*, with made-up log probabilities, -1/8 for the first and down."""
    records = []
    for at, token in enumerate(tiny_text().text_prompt(text)):
        logprob = -(at + 1) / 8
        records += [
            TokenRecord(1, token + top, logprob - top, int(Flag.TOP)) for top in range(tops)
        ]
        records.append(TokenRecord(1, token, logprob, int(Flag.TOKEN)))
    return records


def with_logprobs(stop: str = "") -> Answer:
    """Return an answer whose tokens are told with their log probabilities."""
    return answer(stop=stop, logprobs=Logprobs(tiny_text().token_bytes))


def test_a_token_comes_with_its_text_and_its_likeliest_alternatives() -> None:
    of = with_logprobs()

    pieces = of.add(scored("fox", tops=2)[:3])

    [entry] = of.take_logprobs()
    assert joined(pieces) == [["Text", entry.token.token]]
    assert (entry.offset, entry.token.logprob) == (0, -0.125)
    assert [top.logprob for top in entry.token.top_logprobs] == [-0.125, -1.125]
    assert entry.token.top_logprobs[0].token == entry.token.token
    assert of.take_logprobs() == []


def test_a_character_over_several_tokens_brings_all_of_them() -> None:
    of = with_logprobs()
    records = scored("🦊")
    assert len(records) > 1

    taken = [(joined(of.add([token])), of.take_logprobs()) for token in records]

    assert taken[:-1] == [([], [])] * (len(records) - 1)
    pieces, entries = taken[-1]
    assert pieces == [["Text", "🦊"]]
    assert [entry.offset for entry in entries] == [0] * len(records)
    assert bytes(byte for entry in entries for byte in entry.token.bytes).decode() == "🦊"


def test_text_that_could_begin_a_stop_string_holds_its_tokens_back() -> None:
    of = with_logprobs(stop="brown bear")
    shown = told = ""

    for token in scored("a quick brown fox"):
        shown += "".join(piece[1] for piece in joined(of.add([token])))
        told += "".join(entry.token.token for entry in of.take_logprobs())
        assert shown.startswith(told)
        assert "brown" not in told or "fox" in told

    assert told == shown == "a quick brown fox"


def test_tokens_of_a_stop_string_are_not_told() -> None:
    of = with_logprobs(stop="brown")

    pieces = of.add(scored("a quick brown fox"))

    entries = of.take_logprobs()
    assert joined(pieces) == [["Text", "a quick "]]
    assert all(entry.offset < len("a quick ") for entry in entries)
    assert "".join(entry.token.token for entry in entries).startswith("a quick")


@pytest.mark.parametrize("finish", [Flag.LENGTH, Flag.STOP])
def test_the_end_lets_everything_out_but_the_token_that_made_it(finish: Flag) -> None:
    of = with_logprobs(stop="foxes")
    *records, last = scored("fox")
    records.append(last._replace(flags=int(Flag.TOKEN | finish)))

    of.add(records)

    kept = len(records) if finish is Flag.LENGTH else len(records) - 1
    assert len(of.take_logprobs()) == kept


def test_bytes_that_never_became_a_character_are_told_at_the_end() -> None:
    of = with_logprobs()
    first, *_ = scored("🦊")

    pieces = of.add([first._replace(flags=int(Flag.TOKEN | Flag.LENGTH))])

    [entry] = of.take_logprobs()
    assert joined(pieces) == [["Text", "�"]]
    assert entry.token.bytes == list("🦊".encode()[: len(entry.token.bytes)])


def test_a_probability_of_nothing_is_no_number() -> None:
    of = with_logprobs()
    nothing = float("-inf")

    of.add([TokenRecord(1, 5, nothing, int(Flag.TOP)), TokenRecord(1, 6, nothing, 1)])

    [entry] = of.take_logprobs()
    assert (entry.token.logprob, entry.token.top_logprobs) == (None, [])
