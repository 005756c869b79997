"""The package's docstring is its map."""

from pathlib import Path

import pytest

from cortex import runtime

FILES = [path.name for path in Path(runtime.__file__).parent.glob("[!_]*.py")]


@pytest.mark.parametrize("file", sorted(FILES))
def test_the_map_of_the_neuron_names_every_file(file: str) -> None:
    assert f"``{file}``" in (runtime.__doc__ or "")
