"""The client sees the name it asked for, in answers, streams and errors."""

from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.renaming import RenamedStream, Renaming
from cortex.ipc.errors import InvalidRequest, ModelNotFound, Unloadable
from fakes import FakeNeuron, gateway_config

PATH = "/srv/private/x.gguf"
SOURCE = f"file:{PATH}"
CATALOGUE = Catalogue({"house": Profile("house", source=SOURCE)}, {"nick": "house"})
NAMES = pytest.mark.parametrize("name", ["house", "nick"])
CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
COUNT, RESPONSES = "/v1/messages/count_tokens", "/v1/responses"


async def ask(
    session: aiohttp.ClientSession, neuron: FakeNeuron, path: str, name: str, **more: Any
) -> tuple[int, str]:
    turn = {"role": "user", "content": "hi"}
    asked = {"input": [turn]} if path == RESPONSES else {"max_tokens": 5, "messages": [turn]}
    body = {"model": name, **asked, **more}
    async with (
        Gateway(gateway_config(neuron), CATALOGUE) as gateway,
        session.post(gateway.url + path, json=body) as response,
    ):
        return response.status, await response.text()


@NAMES
@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES])
async def test_an_answer_has_the_name_that_was_asked_for(
    session: aiohttp.ClientSession, path: str, name: str
) -> None:
    async with FakeNeuron([SOURCE]) as neuron:
        status, text = await ask(session, neuron, path, name)

    assert (status, orjson.loads(text)["model"], PATH in text) == (200, name, False)
    assert neuron.received[0].body["model"] == SOURCE


@NAMES
@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES])
async def test_a_stream_has_the_name_that_was_asked_for(
    session: aiohttp.ClientSession, path: str, name: str
) -> None:
    async with FakeNeuron([SOURCE]) as neuron:
        neuron.keep_alives = 1
        status, text = await ask(session, neuron, path, name, stream=True)

    assert (status, PATH in text, f'"model":"{name}"' in text) == (200, False, True)
    assert "Hello" in text
    assert text.endswith(("data: [DONE]\n\n", 'data: {"type":"message_stop"}\n\n'))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_refusal_of_a_node_names_no_path(
    session: aiohttp.ClientSession, path: str, stream: bool
) -> None:
    async with FakeNeuron([SOURCE]) as neuron:
        neuron.refuses = Unloadable(f"{SOURCE!r}: {PATH}/config.json is bad", kind="x", at=[PATH])
        status, text = await ask(session, neuron, path, "nick", stream=stream)

    error = orjson.loads(text)["error"]
    assert (status, error["message"]) == (422, "'nick': nick/config.json is bad")
    assert (error["kind"], error["at"]) == ("x", ["nick"])


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_a_failure_in_mid_stream_names_no_path(
    session: aiohttp.ClientSession, path: str
) -> None:
    class Telling(FakeNeuron):
        failure = f"{SOURCE!r} has died"

    async with Telling([SOURCE]) as neuron:
        neuron.fails_after_tokens = 1
        _, text = await ask(session, neuron, path, "nick", stream=True)

    assert ("'nick' has died" in text, PATH in text) == (True, False)


async def test_a_load_that_fails_names_no_path(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as neuron:
        neuron.fails_load = f"{PATH} does not exist"
        status, text = await ask(session, neuron, CHAT, "nick")

    assert (status, "nick does not exist" in text, PATH in text) == (502, True, False)


async def test_a_count_that_fails_names_no_path(session: aiohttp.ClientSession) -> None:
    class Strict(FakeNeuron):
        async def _tokenize(self, _: web.Request) -> web.Response:
            raise InvalidRequest(f"{SOURCE!r} has no chat template")

    async with Strict([SOURCE]) as neuron:
        status, text = await ask(session, neuron, COUNT, "nick")

    error = orjson.loads(text)["error"]
    assert (status, error["message"]) == (400, "'nick' has no chat template")


@pytest.mark.parametrize("size", range(1, 40))
def test_lines_may_be_cut_anywhere(size: int) -> None:
    line = b'data: {"id":"c","model":"m","choices":[{"text":"\\"model\\":\\"m\\" \xc3\xa9"}]}'
    stream = b": usage {}\n\n" + line + b"\n\n" + line + b"\r\n\r\ndata: [DONE]\n\n"
    renamed = RenamedStream(Renaming("m", "n"))

    said = b"".join(renamed.feed(stream[at : at + size]) for at in range(0, len(stream), size))

    changed = line.replace(b'"model":"m"', b'"model":"n"')
    expected = b": usage {}\n\n" + changed + b"\n\n" + changed + b"\n\r\ndata: [DONE]\n\n"
    assert said == expected


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"id":1}'])
def test_what_names_no_model_stays_as_it_is(body: bytes) -> None:
    assert Renaming("m", "n").answer(body) == body


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("the model 'm' is loading", "the model 'n' is loading"),
        ("m is full. Ask m.", "n is full. Ask n."),
        ("m-2, org/m, m.gguf, /m and im", "m-2, org/m, m.gguf, /m and im"),
    ],
)
def test_only_whole_names_are_replaced(said: str, shown: str) -> None:
    assert Renaming("m", "n").text(said) == shown


def test_an_error_is_copied_because_others_may_hold_it() -> None:
    error = ModelNotFound("no m", param="model", retry_after_seconds=3)

    with pytest.raises(ModelNotFound, match="no n") as caught, Renaming("m", "n").errors():
        raise error

    assert (str(error), caught.value.__cause__) == ("no m", error)
    assert (caught.value.param, caught.value.retry_after_seconds) == ("model", 3)


def test_an_error_stays_the_same_where_the_names_are() -> None:
    error = ModelNotFound("no m")

    with pytest.raises(ModelNotFound) as caught, Renaming("m", "m").errors():
        raise error

    assert caught.value is error
