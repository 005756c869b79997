"""Bodies that no client should send, in every dialect: each is answered, and none with a bug.

What ``test_openapi_conformance.py`` tries by chance, here by hand: numbers that no type holds, text
that is none, depth, length, and the wrong type in every field and block.
"""

import asyncio
import bisect
import contextlib
import gzip
import io
import itertools
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
from yarl import URL

from cortex.gateway.app import Gateway
from cortex.gateway.dialects.chat import PassedOn
from cortex.gateway.dialects.dialect import Call
from cortex.gateway.dialects.messages import decode_messages
from cortex.gateway.dialects.responses import decode_responses
from cortex.gateway.route_table import CORTEX
from cortex.ipc.errors import ApiError, InvalidRequest, PreviousResponseNotFound
from cortex.ipc.openapi import document
from cortex.ipc.requests import decode_object
from fakes import QUICK, FakeNeuron, gateway_config

BUGS = {500, 502, 504}
MANY = 300_000
TURN = {"role": "user", "content": "x"}
CHAT, TEXT, VECTOR = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"


class NoMemory:
    """A store with nothing in it."""

    def conversation(self, last: str) -> list[dict[str, Any]]:
        raise PreviousResponseNotFound(last)

    def item(self, item_id: str, place: str) -> dict[str, Any]:
        raise InvalidRequest(f"{place}: {item_id!r} is not here")

    def keep(self, response: dict[str, Any], items: msgspec.Raw) -> None:
        """Forget it."""


ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [TURN]},
    TEXT: {"model": "m", "prompt": "x"},
    VECTOR: {"model": "m", "input": "x"},
    MESSAGES: {"model": "m", "max_tokens": 3, "messages": [TURN]},
    COUNT: {"model": "m", "messages": [TURN]},
    RESPONSES: {"model": "m", "input": "x"},
    "/fleet/models/load": {"model": "m"},
    "/fleet/models/unload": {"model": "m"},
    "/fleet/models/pin": {"model": "m"},
    "/fleet/models/unpin": {"model": "m"},
    "/fleet/nodes/a/drain": {},
    "/fleet/nodes/a/undrain": {},
}
PATHS = pytest.mark.parametrize("path", ASKED)
DECODERS: dict[str, Callable[[bytes], Call]] = {
    CHAT: partial(PassedOn.of, CHAT),
    TEXT: partial(PassedOn.of, TEXT),
    VECTOR: partial(PassedOn.of, VECTOR),
    MESSAGES: partial(decode_messages, strip_billing_block=True, counts_only=False),
    COUNT: partial(decode_messages, strip_billing_block=True, counts_only=True),
    RESPONSES: partial(decode_responses, memory=NoMemory(), stores=True),
}
ANSWER = orjson.dumps(
    {
        "model": "another",
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
)
SAID = orjson.loads(document(CORTEX, "1"))

VALUES = [
    *(b"null", b"true", b"0", b"-1", b"1.5", b'""', b'"x"', b"[]", b"{}"),
    *(b"1e400", b"-1e400", b"NaN", b"1" + b"0" * 400, b"18446744073709551616"),
    *(b'"\\ud800"', b'"\\udc00x"', b'{"\\ud800": 1}', b'"\xff"', b'"\xed\xa0\x80"', b'"\\u0000"'),
    *(b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900),
    *(b"[" * 20_000 + b"]" * 20_000, b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    *(b"[null]", b"[1]", b"[[]]", b"[{}]", b'[{"type": []}]', b'[{"type": {}}]', b'{"type": {}}'),
    *(b'{"type": "function", "name": {}}', b'{"type": "tool", "name": []}'),
    b'{"type": "allowed_tools", "mode": [], "tools": [{"type": "function", "name": {}}]}',
]
BLOCKS = (
    *("text", "image", "document", "search_result", "compaction", "tool_reference"),
    *("tool_use", "server_tool_use", "tool_result", "web_search_tool_result", "thinking"),
    *("redacted_thinking", "tool_addition", "tool_removal", "fallback", "nothing_known"),
    *("input_text", "output_text", "refusal", "input_image", "input_file", "image_url"),
    *("message", "reasoning", "function_call", "function_call_output", "custom_tool_call"),
    *("custom_tool_call_output", "item_reference", "web_search_call"),
)
WHOLE: dict[str, Any] = {
    "text": "x",
    "id": "c",
    "call_id": "c",
    "tool_use_id": "c",
    "name": "f",
    "role": "user",
    "arguments": "{}",
    "output": "o",
    "content": "x",
    "input": {},
    "thinking": "x",
    "source": {"type": "text", "data": "x"},
    "tool": {"type": "tool_reference", "name": "f"},
    "tool_name": "f",
    "image_url": {"url": "x"},
    "refusal": "x",
    "summary": [],
    "title": "x",
}
"""What some block or other has; each gets every member but one as it should be."""
IN_A_BLOCK = [
    *(b"null", b"1", b"1e400", b'"\\udc00"', b"[]", b"{}", b"[[]]", b"[{}]", b'[{"type": []}]'),
    *(b'{"type": {}}', b'{"type": "content", "content": [1]}', b'{"url": []}'),
    *(b'{"type": "tool_definition", "definition": {}}', b"[" * 990 + b"]" * 990),
    b'{"a":' * 990 + b"1" + b"}" * 990,
]


def with_raw(body: Mapping[str, Any], name: str, raw: bytes) -> bytes:
    """Return *body* as JSON, with *raw* as what it says of *name*."""
    known = {**body, name: None}
    members = [
        orjson.dumps(key) + b":" + (raw if key == name else orjson.dumps(value))
        for key, value in known.items()
    ]
    return b"{" + b",".join(members) + b"}"


def fields_of(path: str) -> list[str]:
    """Return what the document says that a body of *path* may have."""
    shown = path.replace("/nodes/a/", "/nodes/{name}/")
    body = SAID["paths"][shown]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    return [*SAID["components"]["schemas"][name]["properties"]]


class Asking:
    """Asks a gateway, and sees that each answer is one."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self._session = session

    async def post(self, path: str, body: bytes, **headers: str) -> None:
        """Fail where a POST is answered with a bug, or what is refused has no envelope."""
        await self._ask("POST", path, io.BytesIO(body), headers)

    async def get(self, path: str, **headers: str) -> None:
        """Do the same with a GET."""
        await self._ask("GET", path, None, headers)

    async def _ask(
        self, method: str, path: str, body: io.BytesIO | None, headers: Mapping[str, str]
    ) -> None:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        url = URL(self.gateway.url + path, encoded=True)
        async with self._session.request(method, url, data=body, headers=sent) as response:
            said = await response.read()
        assert response.status not in BUGS, (path, said)
        if response.status >= 400:
            assert orjson.loads(said)["error"]["message"], path


@pytest.fixture
async def asking(session: aiohttp.ClientSession) -> Any:
    """A gateway before a neuron, both of which are there afterwards."""
    async with FakeNeuron(["m"]) as neuron, Gateway(gateway_config(neuron)) as gateway:
        asking = Asking(gateway, session)
        yield asking
        gateway.drains.undrain("a")
        assert gateway.door.inside == 0


@pytest.mark.parametrize("path", DECODERS)
def test_any_value_of_any_field_is_taken_or_refused(path: str) -> None:
    for name, raw in itertools.product(fields_of(path), VALUES):
        decoded(path, with_raw(ASKED[path], name, raw))


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("kind", BLOCKS)
def test_any_value_of_any_member_of_a_block_is_taken_or_refused(path: str, kind: str) -> None:
    for name, raw in itertools.product(WHOLE, IN_A_BLOCK):
        block = with_raw({**WHOLE, "type": kind}, name, raw)
        for turns in turns_around(block, path):
            decoded(path, turns)


DEEP: dict[str, tuple[str, bytes]] = {
    "a function": (MESSAGES, b'"tools": [{"name": "f", "input_schema": {"a": %b}}]'),
    "an item's function": (
        RESPONSES,
        b'"tools": [{"type": "function", "name": "f", "parameters": {"a": %b}}]',
    ),
    "a function in a namespace": (
        RESPONSES,
        (
            b'"tools": [{"type": "namespace", "name": "n", "tools": '
            b'[{"type": "function", "name": "f", "parameters": {"a": %b}}]}]'
        ),
    ),
    "a format": (
        RESPONSES,
        b'"text": {"format": {"type": "json_schema", "name": "n", "schema": {"a": %b}}}',
    ),
    "metadata": (RESPONSES, b'"metadata": {"a": %b}'),
    "an output": (
        RESPONSES,
        b'"input": [{"type": "function_call_output", "call_id": "c", "output": {"a": %b}}]',
    ),
}


@pytest.mark.parametrize("where", DEEP)
def test_what_can_just_be_read_can_be_written_or_is_refused(where: str) -> None:
    path, member = DEEP[where]
    whole = orjson.dumps(ASKED[path])[:-1] + b", " + member + b"}"
    deepest = bisect.bisect(range(100_000), False, key=lambda depth: not is_read(nested(depth)))

    for depth in range(deepest - 12, deepest + 1):
        decoded(path, whole % nested(depth))


def nested(depth: int) -> bytes:
    """Return so many objects in one another."""
    return b'{"a":' * depth + b"1" + b"}" * depth


def is_read(body: bytes) -> bool:
    """Whether *body* is not nested too deeply."""
    try:
        decode_object(body)
    except ApiError:
        return False
    return True


def decoded(path: str, body: bytes) -> None:
    """Decode *body*, and write what the node gets; a refusal that says so is as good."""
    with contextlib.suppress(ApiError):
        call = DECODERS[path](body)
        assert json.loads(call.answer("another", ANSWER))
        assert call.body("another")


@PATHS
async def test_any_body_is_answered(asking: Asking, path: str) -> None:
    whole = orjson.dumps(ASKED[path])
    others = [b"", b" ", b"\0", whole[:-1], whole * 2, b"\xef\xbb\xbf" + whole]
    for body in [*VALUES, *others, whole.decode().encode("utf-16")]:
        await asking.post(path, body)
    for body in [*others, whole]:
        await asking.post(path, gzip.compress(body), content_encoding="gzip")
        await asking.post(path, body, content_encoding="deflate")
        await asking.post(path, body, content_encoding="br")
        await asking.post(path, body, content_type="text/plain", anthropic_version="x")


def turns_around(block: bytes, path: str) -> list[bytes]:
    """Return bodies in which *block* stands wherever one can."""
    if path == RESPONSES:
        answers = b'{"type": "function_call_output", "call_id": "c", "output": [%b]}' % block
        says = b'{"role": "user", "content": [%b]}' % block
        return [b'{"model": "m", "input": [%b]}' % item for item in (block, answers, says)]
    result = b'{"type": "tool_result", "tool_use_id": "c", "content": [%b]}' % block
    bodies = [
        b'{"role": "%b", "content": [%b]}, {"role": "user", "content": "x"}' % (role, said)
        for role, said in ((b"user", block), (b"assistant", block), (b"user", result))
    ]
    return [b'{"model": "m", "max_tokens": 3, "messages": [%b]}' % turns for turns in bodies]


@PATHS
@pytest.mark.parametrize("entry", [b"0", b"{}", b'"x"', orjson.dumps(TURN)])
async def test_very_many_entries_are_answered(asking: Asking, path: str, entry: bytes) -> None:
    many = b"[" + b",".join([entry] * MANY) + b"]"

    for name in {"messages", "input", "tools", "prompt", "system", "stop"} & {*fields_of(path)}:
        await asking.post(path, with_raw(ASKED[path], name, many))


async def test_a_count_may_take_as_long_as_an_answer(session: aiohttp.ClientSession) -> None:
    timeouts = msgspec.structs.replace(QUICK, control_seconds=600.0, between_bytes_seconds=0.05)

    async with (
        FakeNeuron(["m"]) as neuron,
        Gateway(gateway_config(neuron, timeouts=timeouts)) as gateway,
        asyncio.timeout(20),
    ):
        neuron.may_count.clear()
        async with session.post(gateway.url + COUNT, json=ASKED[COUNT]) as response:
            error = (await response.json())["error"]

    assert (response.status, error["code"]) == (504, "node_timeout")


GETS = [
    *("/v1/models", "/v1/models/m", "/v1/models/%00", "/v1/models/%ff", "/v1/models//"),
    *("/fleet", "/fleet/placement", "/fleet/usage", "/v1/responses/%00"),
    *("/v1/responses/x/input_items", "/health", "/%ff", "//"),
]
QUERIES = [
    *("limit=0", "limit=-1", "limit=1e3", "limit=%D9%A3", "limit=%C2%B2", f"limit={'9' * 4000}"),
    *("limit=%ff", "limit=1&limit=x", "after_id=%00", "before_id=%ff", "order=x", "after=%00"),
    *("since=2020-13-01", "since=%00", "since=9999-12-31", "since=20200101", "since="),
    *("key=%ff", "model=%00", "model=%ff", f"model={'x' * 5000}", "stream=", "%", "%zz", "=", "&&"),
]


@pytest.mark.parametrize("path", GETS)
async def test_any_query_is_answered(asking: Asking, path: str) -> None:
    for query, version in itertools.product(QUERIES, [{}, {"anthropic_version": "x"}]):
        await asking.get(f"{path}?{query}", **version)
