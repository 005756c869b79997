"""Text leaves in whole characters, whatever the split, and never with a part of a stop string."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.models.checkpoints.gguf import GGUFFile
from cortex.runtime.detokenizer import Detokenizer, StopStrings
from cortex.runtime.tokenizer import Tokenizer
from tiny_text import metadata_of, trained


@cache
def tokenizer() -> Tokenizer:
    metadata = metadata_of(trained("smollm"), "smollm")
    return Tokenizer.from_gguf(GGUFFile(Path("tiny.gguf"), metadata, {}))


def bytes_ids(data: bytes) -> list[int]:
    """One token per byte."""
    of_byte = {tokenizer().bytes_of(i): i for i in range(tokenizer().vocab_size)}
    return [of_byte[bytes([byte])] for byte in data]


def test_the_bytes_of_a_split_emoji_wait_for_each_other() -> None:
    detokenizer = Detokenizer(tokenizer())

    pieces = [detokenizer.add([i]) for i in bytes_ids("a😀b".encode())]

    assert pieces == ["a", "", "", "", "😀", "b"]


def test_an_emoji_that_never_ends_is_shown_as_a_replacement_character() -> None:
    detokenizer = Detokenizer(tokenizer())

    sent = detokenizer.add(bytes_ids(b"a" + "😀".encode()[:3]))

    assert (sent, detokenizer.flush()) == ("a", "�")


def test_control_tokens_and_what_ends_a_sequence_are_not_shown() -> None:
    think = tokenizer().id_of("<think>")
    assert think is not None
    ids = tokenizer().encode("a<|im_end|>b<think>c")

    assert Detokenizer(tokenizer()).add(ids) == "ab<think>c"
    assert Detokenizer(tokenizer(), hidden_ids=[think]).add(ids) == "abc"


@given(st.lists(st.lists(st.integers(0, 700), max_size=5)))
def test_the_pieces_laid_end_to_end_are_the_whole(pieces: list[list[int]]) -> None:
    detokenizer = Detokenizer(tokenizer())

    sent = [detokenizer.add(piece) for piece in pieces] + [detokenizer.flush()]

    assert "".join(sent) == tokenizer().decode(i for piece in pieces for i in piece)


def test_a_stop_string_and_what_follows_are_not_sent() -> None:
    stops = StopStrings(["END"])

    assert stops.add("answer END more") == ("answer ", True)
    assert stops.add("even more") == ("", True)
    assert stops.flush() == ""


def test_a_stop_string_is_found_across_pieces() -> None:
    stops = StopStrings(["END"])

    assert [stops.add(piece) for piece in ("one E", "N", "D two")] == [
        ("one ", False),
        ("", False),
        ("", True),
    ]


def test_only_what_could_be_the_start_of_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nQ:"])

    assert stops.add("text\n") == ("text", False)
    assert stops.add("more") == ("\nmore", False)


def test_what_was_held_back_leaves_at_the_end() -> None:
    stops = StopStrings(["\n\nQ:"])

    sent, _ = stops.add("text\n\nQ")

    assert (sent, stops.flush()) == ("text", "\n\nQ")


@pytest.mark.parametrize(
    ("text", "kept"), [("xabcd", "xa"), ("xcd", "x"), ("xabax", "x"), ("abcd", "a"), ("ab", "")]
)
def test_the_stop_string_that_is_complete_first_wins(text: str, kept: str) -> None:
    assert StopStrings(["abcd", "bc", "cd", "aba"]).add(text)[0] == kept


def test_of_two_stop_strings_that_end_together_the_longer_wins() -> None:
    assert StopStrings(["c", "abc"]).add("xabc") == ("x", True)


def test_without_stop_strings_everything_passes() -> None:
    stops = StopStrings([""])

    assert stops.add("anything") == ("anything", False)


def first_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, one character at a time."""
    for end in range(1, len(text) + 1):
        if hits := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, hits))]
    return text


@given(
    pieces=st.lists(st.text("ab\n", max_size=4)),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_how_the_text_is_split_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    watcher = StopStrings(stops)
    expected = first_stop("".join(pieces), stops)

    sent, was_hit = "", False
    for piece in pieces:
        text, was_hit = watcher.add(piece)
        sent += text
        assert expected.startswith(sent)

    assert sent + watcher.flush() == expected
    assert was_hit == (expected != "".join(pieces))
