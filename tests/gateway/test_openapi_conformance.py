"""The gateway does what its document says, whatever is asked: properties, tried by schemathesis.

Behind it is a neuron's whole HTTP, in front of a fake supervisor, so that what the gateway passes
on is judged as it will be. ``CORTEX_API_EXAMPLES`` tries more of each (15 in a plain run: seconds).
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from schemathesis import GenerationMode

from api_cases import CONFORMS, HERE, REFUSES, name_of, operations, tried
from at_rest import MODEL
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Neuron
from cortex.gateway.route_table import CORTEX
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.openapi import document
from fake_node import FakeModel, FakeNode, tiny_text
from fakes import gateway_config
from gateway_thread import GatewayThread
from neuron_thread import NeuronThread

EXAMPLES = int(os.environ.get("CORTEX_API_EXAMPLES", "15"))
SAID: dict[str, Any] = msgspec.json.decode(document(CORTEX, "1"))
OPERATIONS = operations(MODEL, SAID)
WITH_A_BODY = [forms for forms in OPERATIONS if forms[0].body]


class LoadsAtOnce(FakeNode):
    """A node whose models are loaded as soon as they are asked for, and can embed."""

    async def load(self, request: LoadRequest) -> FakeModel:
        """Load it."""
        text = dataclasses.replace(tiny_text(), pooling="mean")
        return self.models.setdefault(
            request.model_id, FakeModel(request, self.devices[:1], text=text)
        )


@pytest.fixture(scope="module")
def served() -> Iterator[GatewayThread]:
    with NeuronThread(LoadsAtOnce()) as neuron:
        config = msgspec.structs.replace(
            gateway_config(), neurons=(Neuron(str(HERE["name"]), neuron.url),)
        )
        with GatewayThread(config, Catalogue({MODEL: Profile(MODEL)})) as gateway:
            yield gateway
        neuron.check_at_rest()


@pytest.fixture
def url(served: GatewayThread) -> Iterator[str]:
    """Where a gateway is that is looked at afterwards."""
    yield served.url
    served.check_at_rest()


@pytest.mark.parametrize("forms", OPERATIONS, ids=name_of)
def test_whatever_the_document_allows_is_answered_as_it_says(url: str, forms: Any) -> None:
    tried(forms, GenerationMode.POSITIVE, url, CONFORMS, EXAMPLES, said=SAID)


@pytest.mark.parametrize("forms", WITH_A_BODY, ids=name_of)
def test_whatever_the_document_forbids_is_refused_as_it_says(url: str, forms: Any) -> None:
    is_of_fleet = "/fleet/" in name_of(forms)  # which lets go of pins of anything
    wrong = forms[:1] if is_of_fleet else forms[:2]

    tried(wrong, GenerationMode.NEGATIVE, url, [*CONFORMS, *REFUSES], EXAMPLES, said=SAID)
