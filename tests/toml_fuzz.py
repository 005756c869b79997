"""Files and variables as nobody should write them, to test that all are refused in words.

``files_for`` makes TOML that is mostly well-formed and mostly wrong: names of real options with
values of any type, misspelt names, tables where values belong and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
from hypothesis import strategies as st

from cortex.ipc.option_errors import is_table

ODD = [
    *(json.dumps(text) for text in ("", "auto", "cpu:0", "a:1", "\0", "/a\0b", "~nobody-here/x")),
    *(json.dumps(text) for text in ("..:1", "x" * 70 + ":1", "127.0.0.1:0", "a", "smollm", "/")),
    *("-1", "0", "1", "16", "9223372036854775807", "9223372036854775808", "-1e400", "1e400"),
    *("nan", "inf", "-0.0", "0.5", "1.0", "0xff", "true", "false", "1979-05-27", "07:32:00"),
    *("1979-05-27T07:32:00Z", "[]", "{}", "[[]]", "'''a\nb'''", "9" * 5000, "[" * 5000),
]
"""Values, in TOML's spelling; the last but one is no number for Python, the last no value."""


def values() -> st.SearchStrategy[str]:
    """Return values in TOML's spelling."""
    leaves = st.sampled_from(ODD) | st.text(max_size=8).map(json.dumps) | st.integers().map(str)
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
            | st.lists(inner, max_size=2).map(
                lambda items: f"{{{', '.join(f'k{i} = {it}' for i, it in enumerate(items))}}}"
            )
        ),
        max_leaves=4,
    )


def options_of(shape: Any) -> Iterator[str]:
    """Yield the names of all options of *shape*, in all of its tables."""
    if is_table(shape):
        for field in msgspec.structs.fields(shape):
            yield field.encode_name
            yield from options_of(field.type)
    for part in get_args(shape):
        yield from options_of(part)


def files_for(shape: type[msgspec.Struct]) -> st.SearchStrategy[str]:
    """Return files for *shape*."""
    names = st.sampled_from(sorted(set(options_of(shape)))) | st.sampled_from(["nmae", '""', "a.b"])
    lines = (
        st.tuples(names, values()).map(" = ".join)
        | names.map("[{}]".format)
        | names.map("[[{}]]".format)
        | st.tuples(names, names).map(lambda both: f"[{both[0]}.{both[1]}]")
    )
    return st.lists(lines, max_size=6).map("\n".join) | st.text(max_size=40)


def variables_for(shape: type[msgspec.Struct], prefix: str) -> st.SearchStrategy[dict[str, str]]:
    """Return environments with variables for *shape*."""
    steps = st.sampled_from([*sorted(set(options_of(shape))), "0", "1", "-1", "00", "", "nmae"])
    names = st.lists(steps, min_size=1, max_size=4).map(lambda s: prefix + "__".join(s).upper())
    texts = st.sampled_from([*ODD, "cpu:0,cpu:0", "\udcff", ","]) | st.text(max_size=8)
    return st.dictionaries(names, texts, max_size=3)
