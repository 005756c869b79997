"""What msgspec found wrong, as words and a place; requests and settings each say it their way."""

from __future__ import annotations

import re

import msgspec

_SAID = re.compile(r"(?P<words>.*?)(?: - at (?:`key` in )?`\$\.?(?P<place>[^`]*)`)?", re.DOTALL)

UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


def words_and_place(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return what is wrong, and where: ``messages[0].role``, or nothing for the whole."""
    said = _SAID.fullmatch(str(error))
    assert said is not None, "the place is optional, and the words are anything"
    return said["words"], said["place"] or ""
