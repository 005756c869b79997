"""Real processes, real sockets, the real embedded model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_gateway import LocalGateway
from local_neuron import ScriptedNeuron

from stack import MODEL, Stack

ALIASES = {"gpt-5-scripted": MODEL, "claude-sonnet-4-scripted": MODEL}
"""Names that checkers take for those of models that reason."""


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


@pytest.fixture(scope="session")
def scripted_url(embedded_model: Path) -> Iterator[str]:
    """Where a gateway serves a model that says what ``scripted_model.py`` says, for wit."""
    with ScriptedNeuron("scripted-neuron", [MODEL]) as neuron:
        neuron.wait_until_loaded()
        with LocalGateway("scripted-gateway", {"local": neuron.place}, ALIASES) as gateway:
            gateway.wait_until_serving(MODEL)
            yield f"http://{gateway.place}"


@pytest.fixture
def fragile_stack(tmp_path: Path, embedded_model: Path) -> Iterator[Stack]:
    """A stack of one's own, to be broken; its second device is there to stay whole."""
    with Stack(devices="cpu:0,cpu:1", log=tmp_path / "log") as running:
        running.wait_serving()
        yield running
