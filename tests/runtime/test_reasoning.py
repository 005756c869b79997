"""How much reasoning is wished for, and which part of an answer it is."""

from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.ipc.openai import Thinking
from cortex.runtime.conversation import ReasoningWish
from cortex.runtime.pieces import Piece, PlainReader, Reasoning, Text
from cortex.runtime.reasoning import (
    FORMATS,
    ReasoningReader,
    format_of,
    nearest_word,
    settled,
    wish_of,
)
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS as TOOL_FORMATS

THINK = FORMATS["think"]


# how much


@pytest.mark.parametrize(
    ("effort", "thinking", "wish"),
    [
        (None, None, ReasoningWish()),
        ("none", None, ReasoningWish(is_enabled=False)),
        ("minimal", None, ReasoningWish(is_enabled=True, effort="minimal")),
        ("max", None, ReasoningWish(is_enabled=True, effort="max")),
        (None, Thinking("enabled"), ReasoningWish(is_enabled=True)),
        (None, Thinking("enabled", 99), ReasoningWish(is_enabled=True, budget_tokens=99)),
        (None, Thinking("disabled"), ReasoningWish(is_enabled=False)),
        (None, Thinking("adaptive"), ReasoningWish()),
        ("high", Thinking("adaptive"), ReasoningWish(is_enabled=True, effort="high")),
        ("high", Thinking("disabled"), ReasoningWish(is_enabled=False, effort="high")),
        ("none", Thinking("enabled"), ReasoningWish(is_enabled=True)),
        ("low", Thinking("enabled", 9), ReasoningWish(True, "low", 9)),
    ],
)
def test_one_rule_says_what_a_request_wishes(
    effort: str | None, thinking: Thinking | None, wish: ReasoningWish
) -> None:
    assert wish_of(effort, thinking) == wish


@pytest.mark.parametrize(
    ("arguments", "is_enabled"),
    [
        ({"enable_thinking": False}, False),
        ({"thinking": False}, False),
        ({"enable_thinking": True, "thinking": False}, True),
        ({"enable_thinking": "no"}, True),
        ({}, True),
    ],
)
def test_what_is_said_to_the_template_itself_wins(
    arguments: dict[str, Any], is_enabled: bool
) -> None:
    wish = ReasoningWish(is_enabled=True, effort="low", budget_tokens=5)

    assert settled(wish, arguments) == ReasoningWish(is_enabled, "low", 5)


@pytest.mark.parametrize(
    ("effort", "word"),
    [("minimal", "low"), ("low", "low"), ("medium", "high"), ("xhigh", "high"), ("max", "high")],
)
def test_an_effort_becomes_the_nearest_word_the_template_knows(effort: str, word: str) -> None:
    assert nearest_word(effort, ("low", "high")) == word


@pytest.mark.parametrize(
    ("template", "parser", "name"),
    [
        ("... <think> ... </think>", "auto", "think"),
        ("[THINK]x[/THINK]", "auto", "mistral"),
        ("only </think>", "auto", None),
        ("nothing", "auto", None),
        ("nothing", "seed", "seed"),
        ("<think></think>", "none", None),
    ],
)
def test_a_templates_own_marks_are_looked_for(template: str, parser: str, name: str | None) -> None:
    assert format_of(template, parser) == (FORMATS[name] if name else None)


# which part


def read(
    answer: str, splits: Any = (), *, is_open: bool = False, mark: str = "think"
) -> list[tuple[str, str]]:
    """Read *answer* cut at *splits*; pieces of a kind joined."""
    reader = ReasoningReader(FORMATS[mark], PlainReader(), is_open=is_open)
    cuts = [0, *sorted(splits), len(answer)]
    pieces = [piece for at, end in pairwise(cuts) for piece in reader.add(answer[at:end])]
    return joined([*pieces, *reader.flush()])


def joined(pieces: list[Piece]) -> list[tuple[str, str]]:
    said = [
        (type(piece).__name__, piece.text)
        for piece in pieces
        if isinstance(piece, Reasoning | Text)
    ]
    assert len(said) == len(pieces)
    return [(kind, "".join(t for _, t in one)) for kind, one in groupby(said, lambda s: s[0])]


@pytest.mark.parametrize(
    ("answer", "is_open", "said"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, [("Reasoning", "Hm."), ("Text", "Yes.")]),
        (" \n<think>Hm.</think>Yes.", False, [("Reasoning", "Hm."), ("Text", "Yes.")]),
        (
            "\nHm.\n\nOh.\n</think>\n\nYes.\n",
            True,
            [("Reasoning", "Hm.\n\nOh."), ("Text", "Yes.\n")],
        ),
        ("<think>\n\n</think>\n\nYes.", False, [("Text", "Yes.")]),
        ("</think>Yes.", True, [("Text", "Yes.")]),
        ("<think>Hm.\n</thi", False, [("Reasoning", "Hm.\n</thi")]),
        ("Hm.\n\n", True, [("Reasoning", "Hm.")]),
        (
            "<think>a</think>b<think>c</think>",
            False,
            [
                ("Reasoning", "a"),
                ("Text", "b<think>c</think>"),
            ],
        ),
        ("The tag <think> is", False, [("Text", "The tag <think> is")]),
        (" \n Yes.", False, [("Text", " \n Yes.")]),
        ("<thin", False, [("Text", "<thin")]),
        (" ", False, [("Text", " ")]),
        ("", False, []),
        ("", True, []),
        ("a </think", True, [("Reasoning", "a </think")]),
        ("a < b </b></think>c", True, [("Reasoning", "a < b </b>"), ("Text", "c")]),
    ],
)
def test_reasoning_is_parted_from_the_answer(
    answer: str, is_open: bool, said: list[tuple[str, str]]
) -> None:
    assert read(answer, is_open=is_open) == said
    assert read(answer, range(1, len(answer)), is_open=is_open) == said


@pytest.mark.parametrize("mark", FORMATS)
def test_every_format_is_read(mark: str) -> None:
    form = FORMATS[mark]

    said = read(f"{form.begin}Hm.{form.end}Yes.", mark=mark)

    assert said == [("Reasoning", "Hm."), ("Text", "Yes.")]


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/think>", "\n", " ", "a"])).map("".join),
    st.booleans(),
    st.data(),
)
def test_no_split_changes_what_is_read(answer: str, is_open: bool, data: Any) -> None:
    splits = data.draw(st.sets(st.integers(0, len(answer))))

    assert read(answer, splits, is_open=is_open) == read(answer, is_open=is_open)


def test_reasoning_is_shown_as_it_comes_but_for_what_may_be_its_end() -> None:
    reader = ReasoningReader(THINK, PlainReader(), is_open=True)

    assert reader.add("\nOne") == [Reasoning("One")]
    assert reader.add("\n</th") == []
    assert reader.add("at>") == [Reasoning("\n</that>")]


def test_a_call_inside_of_reasoning_is_reasoning_and_one_behind_it_a_call() -> None:
    answer = '<tool_call>{"name": "f"}</tool_call>'
    tools = ToolCallReader(TOOL_FORMATS["hermes"], {"f": {}})
    reader = ReasoningReader(THINK, tools, is_open=True)

    pieces = reader.add(f"{answer}</think>{answer}") + reader.flush(ended=True)

    assert pieces[0] == Reasoning(answer)
    assert [type(piece).__name__ for piece in pieces[1:]] == ["CallBegins", "CallArguments"]


def test_the_end_of_the_answer_reaches_the_reader_of_the_rest() -> None:
    tools = ToolCallReader(TOOL_FORMATS["hermes"], {"f": {}})
    reader = ReasoningReader(THINK, tools, is_open=False)

    pieces = reader.add('<tool_call>{"name": "f"') + reader.flush(ended=True)

    assert [type(piece).__name__ for piece in pieces] == ["CallBegins", "CallArguments"]


@pytest.mark.parametrize(
    ("prompt", "is_open", "is_over"),
    [
        ("<|im_start|>assistant\n<think>\n", True, False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False, True),
        ("<think> is a tag<|im_start|>assistant\n", False, False),
    ],
)
def test_the_prompts_end_says_where_the_answer_begins(
    prompt: str, is_open: bool, is_over: bool
) -> None:
    assert (THINK.is_open_after(prompt), THINK.is_over_after(prompt)) == (is_open, is_over)
