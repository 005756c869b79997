"""In which line of a TOML text an option stands, for error messages.

tomllib forgets lines, and no library that keeps them is worth a dependency. A place inside an
inline table or a multi-line string is not found; the message then does without a line.
"""

from __future__ import annotations

import re

_HEADER = re.compile(r"^\s*(?P<open>\[\[?)\s*(?P<name>[^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"^\s*(?P<key>[\w.-]+|\"[^\"]+\"|'[^']+')\s*=")


def line_of(text: str, place: str) -> int | None:
    """Return the 1-based line of *place* (``neurons[1].name``), or of the table it belongs to."""
    lines = _places(text)
    while place:
        if place in lines:
            return lines[place]
        place = re.sub(r"(\.[^.\[]+|\[[^\]]*\]|^[^.\[]+)$", "", place)
    return None


def _places(text: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = name = header["name"]
            if header["open"] == "[[":
                table = f"{name}[{counts.get(name, 0)}]"
                counts[name] = counts.get(name, 0) + 1
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            name = key["key"].strip("\"'")
            lines.setdefault(f"{table}.{name}".strip("."), number)
    return lines
