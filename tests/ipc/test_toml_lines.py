"""In which line an option stands."""

import pytest

from cortex.ipc.toml_lines import Keys, line_of, lines_of

TEXT = """\
# comment
listen = "a:1"
tower.height = 3
"quoted key" = 1

[gateway]  # comment
listen = "b:2"
[[neurons]]
name = "a"
[neurons.limits]
tokens = 3
[[neurons]]
name = "b"
[[neurons.keys]]
id = "x"
[[neurons.keys]]
id = "y"
[ "spaced" . out ]
on = true
models = [
  { id = "m" },
]
"""


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("listen",), 2),
        (("tower",), 3),
        (("tower", "height"), 3),
        (("quoted key",), 4),
        (("gateway",), 6),
        (("gateway", "listen"), 7),
        (("neurons",), 8),
        (("neurons", 0, "name"), 9),
        (("neurons", 0, "limits", "tokens"), 11),
        (("neurons", 1), 12),
        (("neurons", 1, "name"), 13),
        (("neurons", 1, "keys", 1, "id"), 17),
        (("spaced", "out", "on"), 19),
        (("spaced", "out", "models", 0, "id"), 20),
        (("gateway", "absent"), 6),
        (("neurons", 0, "endpoint"), 8),
        (("absent",), None),
        ((), None),
    ],
)
def test_an_option_has_its_line_or_that_of_what_is_around_it(keys: Keys, line: int | None) -> None:
    assert line_of(lines_of(TEXT), keys) == line
