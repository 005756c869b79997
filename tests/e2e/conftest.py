"""Real processes, real sockets, the real embedded model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import Stack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Stack]:
    """A stack that serves; shared by the tests that break nothing."""
    with Stack(log=tmp_path_factory.mktemp("stack") / "log") as running:
        running.wait_serving()
        yield running


@pytest.fixture
def fragile_stack(tmp_path: Path, embedded_model: Path) -> Iterator[Stack]:
    """A stack of one's own, to be broken; its second device is there to stay whole."""
    with Stack(devices="cpu:0,cpu:1", log=tmp_path / "log") as running:
        running.wait_serving()
        yield running
