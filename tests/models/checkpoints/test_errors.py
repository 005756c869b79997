"""What errors repeat of a file is short and printable, whatever the file holds."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.models.checkpoints.errors import SHOWN_CHARACTERS, listed, shown

BOTTOMLESS: list[Any] = []
for _ in range(200_000):
    BOTTOMLESS = [BOTTOMLESS]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        (7, "7"),
        (None, "None"),
        ("\ud800\n", r"'\ud800\n'"),
        ({"a": ["é"]}, r"{'a': ['\xe9']}"),
        (10**5000, "a number of 16610 bits"),
        (-(10**5000), "a number of 16610 bits"),
        (BOTTOMLESS, "a value nested too deeply to show"),
    ],
    ids=range(8),
)
def test_a_value_is_shown_as_python_writes_it(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("value", ["a" * 10_000, ["a"] * 10_000, {"a" * 10_000: 1}])
def test_a_long_value_is_cut(value: Any) -> None:
    assert len(shown(value)) == SHOWN_CHARACTERS + 1


def test_of_many_names_three_are_listed() -> None:
    assert listed(["d", "a", "c", "b"]) == "'a', 'b', 'c' and 1 more"
    assert listed({"b", "a"}) == "'a', 'b'"
