"""What nodes refuse, said in the words and with the places of the client's own dialect."""

from typing import Any

import aiohttp
import pytest

from cortex.gateway.app import Gateway
from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from every_dialect import CHAT, INPUT, SHORT
from fakes import FakeNeuron, gateway_config

BLIND = "this model reads text only: it cannot take a part of type {!r}"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
PART = "messages[1].content[0].type"


async def refused(
    session: aiohttp.ClientSession, neuron: FakeNeuron, path: str, body: dict[str, Any]
) -> tuple[int, str, str | None]:
    """Return the status of the one answer, its words and its place."""
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + path, json=body) as response,
    ):
        error = (await response.json())["error"]
    return response.status, error["message"], error["param"]


@pytest.mark.parametrize(
    ("path", "body", "kind", "param"),
    [
        (CHAT, SHORT, "image_url", PART),
        (MESSAGES, SHORT, "image", None),
        (RESPONSES, INPUT, "input_image", None),
        (MESSAGES, {**SHORT, "stream": True}, "image", None),
        (RESPONSES, {**INPUT, "stream": True}, "input_image", None),
    ],
)
async def test_what_a_client_never_wrote_is_not_held_against_it(
    *,
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    path: str,
    body: dict[str, Any],
    kind: str,
    param: str | None,
) -> None:
    neuron.refuses = UnsupportedParameter(BLIND.format("image_url"), param=PART)

    found = await refused(session, neuron, path, body)

    assert found == (400, BLIND.format(kind), param)


@pytest.mark.parametrize(
    ("path", "body", "words", "param"),
    [
        (CHAT, SHORT, "tools[0].function: no schema", "tools[0].function"),
        (MESSAGES, SHORT, "no schema", None),
        (RESPONSES, INPUT, "no schema", None),
    ],
)
async def test_a_place_that_a_client_does_not_know_leaves_the_words_too(
    *,
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    path: str,
    body: dict[str, Any],
    words: str,
    param: str | None,
) -> None:
    neuron.refuses = InvalidRequest("tools[0].function: no schema", param="tools[0].function")

    assert await refused(session, neuron, path, body) == (400, words, param)


@pytest.mark.parametrize(
    ("path", "body", "place", "param"),
    [
        (RESPONSES, INPUT, "messages", "input"),
        (RESPONSES, INPUT, "reasoning_effort", "reasoning.effort"),
        (MESSAGES, SHORT, "messages", "messages"),
        (MESSAGES, SHORT, "reasoning_effort", "output_config.effort"),
    ],
)
async def test_a_field_of_another_name_is_told_by_the_clients(
    *,
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    path: str,
    body: dict[str, Any],
    place: str,
    param: str,
) -> None:
    neuron.refuses = InvalidRequest(f"it cannot be {place!r}", param=place)

    found = await refused(session, neuron, path, body)

    assert found == (400, f"it cannot be {param!r}", param)
