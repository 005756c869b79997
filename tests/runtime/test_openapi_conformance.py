"""The API does what its document says, whatever is asked: properties, tried by schemathesis.

Requests are made of the document itself, right ones and wrong ones. Each answer must be one that
the document names, and no bug; what the document forbids must be refused; and afterwards nothing is
left of any request. ``CORTEX_API_EXAMPLES`` tries more of each (20 in a plain run: seconds).
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
from schemathesis import GenerationMode

from api_cases import CONFORMS, REFUSES, name_of, operations, tried
from at_rest import MODEL
from cortex.ipc.node_api import LoadRequest
from fake_node import FakeModel, FakeNode, tiny_text
from neuron_thread import NeuronThread

EXAMPLES = int(os.environ.get("CORTEX_API_EXAMPLES", "20"))
OPERATIONS = operations(MODEL)
WITH_A_BODY = [forms for forms in OPERATIONS if forms[0].body]


class KeepsItsModel(FakeNode):
    """A node whose one model cannot be unloaded for long."""

    async def unload(self, model_id: str, force: bool) -> None:
        """Unload it, and have it again."""
        await super().unload(model_id, force)
        self.load_again()

    def load_again(self) -> None:
        """Have the model, and no other."""
        text = dataclasses.replace(tiny_text(), pooling="mean")
        self.models = {MODEL: FakeModel(LoadRequest(MODEL), self.devices[:1], text=text)}


@pytest.fixture(scope="module")
def served() -> Iterator[NeuronThread]:
    node = KeepsItsModel(MODEL)
    node.load_again()
    with NeuronThread(node) as neuron:
        yield neuron


@pytest.fixture
def url(served: NeuronThread) -> Iterator[str]:
    """Where a neuron is that is looked at afterwards."""
    yield served.url
    served.check_at_rest()


@pytest.mark.parametrize("forms", OPERATIONS, ids=name_of)
def test_whatever_the_document_allows_is_answered_as_it_says(url: str, forms: Any) -> None:
    tried(forms, GenerationMode.POSITIVE, url, CONFORMS, EXAMPLES)


@pytest.mark.parametrize("forms", WITH_A_BODY, ids=name_of)
def test_whatever_the_document_forbids_is_refused_as_it_says(url: str, forms: Any) -> None:
    tried(forms[:2], GenerationMode.NEGATIVE, url, [*CONFORMS, *REFUSES], EXAMPLES)
