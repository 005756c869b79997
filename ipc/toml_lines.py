"""In which line of a TOML text an option stands, for error messages.

tomllib forgets lines, and no library that keeps them is worth a dependency. An option inside an
inline table, or in an array over several lines, has the line where that begins; text in a
multi-line string that looks like an option may be taken for one.
"""

from __future__ import annotations

import re

Keys = tuple[str | int, ...]
"""Where an option stands: ``("neurons", 1, "name")`` is the name of the second of [[neurons]]."""

_PART = r"""(?:"[^"]*"|'[^']*'|[\w-]+)"""
_NAME = rf"(?P<name>{_PART}(?:\s*\.\s*{_PART})*)"
_HEADER = re.compile(rf"\s*(?P<open>\[\[?)\s*{_NAME}\s*\]\]?\s*(?:#.*)?")
_OPTION = re.compile(rf"\s*{_NAME}\s*=.*")


def lines_of(text: str) -> dict[Keys, int]:
    """Return the 1-based line in which each option and each table of *text* begins."""
    lines: dict[Keys, int] = {}
    counts: dict[Keys, int] = {}
    table: Keys = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.fullmatch(line):
            table = at = _table(header, counts)
        elif option := _OPTION.fullmatch(line):
            at = table + _parts(option["name"])
        else:
            continue
        for length in range(1, len(at) + 1):
            lines.setdefault(at[:length], number)
    return lines


def line_of(lines: dict[Keys, int], keys: Keys) -> int | None:
    """Return the line of *keys*, or of the innermost table around it that has one."""
    around = (keys[:length] for length in range(len(keys), 0, -1))
    return next((lines[part] for part in around if part in lines), None)


def _table(header: re.Match[str], counts: dict[Keys, int]) -> Keys:
    """Return where a header stands; *counts* knows how often each array of tables was begun."""
    at: Keys = ()
    for part in _parts(header["name"]):
        begun = counts.get(at, 0)
        at = (*at, begun - 1, part) if begun else (*at, part)
    if header["open"] == "[[":
        counts[at] = counts.get(at, 0) + 1
        at = (*at, counts[at] - 1)
    return at


def _parts(name: str) -> Keys:
    return tuple(part.strip("\"'") for part in re.findall(_PART, name))
