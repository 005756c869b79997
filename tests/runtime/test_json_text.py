"""JSON is judged character by character as the library judges it whole."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cortex.runtime.json_text import JsonText, NotJson, json_of

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NEARLY = st.text('{}[]",:0123456789.eE+-\\/ \n\ttruefalsn', max_size=20)


def loaded(text: str) -> Any:
    """What the library makes of *text*; raw control characters in strings are mended."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, strict=False, parse_constant=refuse)


def is_whole(text: str) -> bool:
    """Whether *text* is JSON without anything put in."""
    judged = JsonText()
    try:
        for character in text.strip(" \t\n\r"):
            judged.add(character)
        return judged.is_complete or not judged.close()
    except NotJson:
        return False


@given(VALUES, st.sampled_from([None, 0, 2]))
def test_any_value_is_accepted_as_it_is_written(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=indent is None)

    assert json_of(text) == text


@given(NEARLY)
@example("-")
@example("01")
@example("1.")
@example("1e+")
@example('{"a":1,}')
@example("[1,]")
@example('{"a" 1}')
@example('"\\x"')
@example('"\\u12g4"')
@example('{"a":1}}')
def test_what_the_library_refuses_is_refused(text: str) -> None:
    try:
        expected = loaded(text)
    except ValueError:
        assert not is_whole(text)
    else:
        assert loaded(json_of(text) or "") == expected


@given(VALUES, st.data())
def test_the_beginning_of_a_value_is_accepted_and_what_is_closed_is_valid(
    value: Any, data: Any
) -> None:
    text = json.dumps(value)
    beginning = text[: data.draw(st.integers(0, len(text)))]
    judged = JsonText()
    for character in beginning:
        judged.add(character)

    try:
        whole = beginning + judged.close()
    except NotJson:
        return

    loaded(whole)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"a": [1, {"b": 2', '{"a": [1, {"b": 2}]}'),
        ('{"a": [', '{"a": []}'),
        ("{", "{}"),
        ('{"a": "b"', '{"a": "b"}'),
        ("12", "12"),
    ],
)
def test_missing_brackets_are_put_in(text: str, whole: str) -> None:
    assert json_of(text) == whole


@pytest.mark.parametrize(
    "text", ["", '"a', '{"a', '{"a":', '{"a":1,', "[1,", "tru", "-", "1e", '"\\']
)
def test_anything_else_that_is_missing_is_not(text: str) -> None:
    assert json_of(text) is None


def test_raw_control_characters_in_a_string_are_escaped() -> None:
    assert json_of('{"a\t": "b\nc\x01"}') == '{"a\\t": "b\\nc\\u0001"}'


def test_a_deep_nest_costs_no_stack() -> None:
    assert json_of("[" * 100_000) == "[" * 100_000 + "]" * 100_000


def test_it_is_complete_with_its_last_bracket_and_takes_nothing_more() -> None:
    text = JsonText()
    for character in '{"a":[]':
        text.add(character)
        assert not text.is_complete

    text.add("}")

    assert text.is_complete
    with pytest.raises(NotJson, match="over"):
        text.add(" ")
