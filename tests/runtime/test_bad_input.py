"""Bodies, framings and paths that nobody should send: words and a code each time, nothing left."""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from at_rest import MODEL, asked, attacked
from bad_http import Bad, bad_http
from cortex.ipc.http_body import LARGE_BYTES
from cortex.ipc.node_api import MAX_BODY_BYTES
from cortex.ipc.requests import MAX_COMMAS, MAX_NAME
from cortex.runtime.config import NeuronConfig
from cortex.runtime.inference import Timing
from fake_node import FakeNode
from raw_http import Answer, head, post, wire

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
INFERENCE = (CHAT, COMPLETIONS, "/v1/embeddings", "/tokenize")
POSTS = (
    *INFERENCE,
    "/models/load",
    "/models/unload",
    "/models/clear_prefix_cache",
    "/devices/0/restart",
)
ASK = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()


async def said(sent: bytes, node: FakeNode | None = None, timing: Timing | None = None) -> Answer:
    """Return what a neuron answers to the bytes *sent*."""
    async with attacked(node, timing=timing) as port, wire(port) as connection:
        return await asked(connection, sent)


@pytest.mark.parametrize("bad", bad_http(CHAT), ids=lambda bad: bad.name)
async def test_what_is_not_http_is_refused_in_the_envelope(bad: Bad) -> None:
    async with attacked() as port, wire(port) as connection:
        answer = await asked(connection, bad.sent)
        if bad.is_closed_after:
            assert await connection.closed()
        else:
            assert (await asked(connection, head("GET", "/health"))).status == 200

    assert answer.refusal == bad.refusal
    assert answer.error["message"]
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]


NOT_JSON = {
    "words": b"not JSON",
    "spaces": b"   ",
    "cut": ASK[:-2],
    "more behind it": ASK + b"{}",
    "a NUL behind it": ASK + b"\0",
    "a NUL in a text": ASK.replace(b"hi", b"\0"),
    "a byte order mark": b"\xef\xbb\xbf" + ASK,
    "UTF-16": ASK.decode().encode("utf-16"),
    "Latin-1": ASK.replace(b"hi", b"\xe9"),
    "a surrogate": ASK.replace(b"hi", b"\xed\xa0\x80"),
    "an escaped surrogate": ASK.replace(b"hi", rb"\ud800"),
    "NaN": b'{"model": NaN}',
    "Infinity": b'{"model": -Infinity}',
    "an octal number": b'{"model": 017}',
    "single quotes": b"{'model': 'm'}",
    "a comment": b"{} // nothing",
    "100,000 arrays": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects": b'{"model":' * 100_000 + b"1" + b"}" * 100_000,
    "an open array": b'{"model": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_body_that_is_not_json_is_malformed(path: str, body: bytes) -> None:
    answer = await said(post(path, body))

    assert answer.refusal == (400, "malformed_json")
    assert answer.error["message"].startswith("the body is n")


@pytest.mark.parametrize("path", POSTS[:-1])
async def test_an_empty_body_is_malformed(path: str) -> None:
    assert (await said(post(path, b""))).refusal == (400, "malformed_json")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"1", b"true"])
async def test_a_body_that_is_no_object_is_invalid(path: str, body: bytes) -> None:
    answer = await said(post(path, body))

    assert answer.refusal == (400, "invalid_request")
    assert "object" in answer.error["message"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"1E+99999"])
async def test_a_number_that_is_no_float_is_invalid(path: str, number: bytes) -> None:
    answer = await said(post(path, b'{"model": "m", "temperature": ' + number + b"}"))

    assert answer.refusal == (400, "invalid_request")
    assert "out of range" in answer.error["message"]


async def test_of_a_field_that_is_there_twice_the_last_counts() -> None:
    twice = b'{"model": "nobody", "prompt": "a", "model": "m"}'

    assert (await said(post("/tokenize", twice))).status == 200


@pytest.mark.parametrize("path", POSTS)
async def test_a_body_that_stops_coming_is_408(path: str) -> None:
    impatient = Timing(body_patience_seconds=0.05)

    answer = await said(head("POST", path, "Content-Length: 100") + b"{", timing=impatient)

    assert answer.refusal == (408, "request_timeout")
    assert "0.05 seconds" in answer.error["message"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing() -> None:
    async with attacked() as port, wire(port) as connection:
        await connection.send(head("POST", CHAT, "Content-Length: 100") + b"{")


async def test_a_body_that_comes_byte_by_byte_is_served() -> None:
    async with attacked(timing=Timing(body_patience_seconds=5)) as port, wire(port) as connection:
        await connection.send(head("POST", "/tokenize", "Transfer-Encoding: chunked"))
        for byte in b'{"model": "m", "prompt": "a"}':
            await connection.send(b"1\r\n%c\r\n" % byte)
            await asyncio.sleep(0)
        await connection.send(b"0\r\n\r\n")

        assert (await connection.answer()).status == 200


async def test_a_length_over_the_limit_is_refused_before_the_body_is_sent() -> None:
    answer = await said(head("POST", CHAT, f"Content-Length: {2**40}"))

    assert answer.refusal == (413, "body_too_large")
    assert "32 MiB" in answer.error["message"]


@pytest.mark.parametrize("path", POSTS)
async def test_a_body_of_ten_million_little_values_is_not_decoded(path: str) -> None:
    many = b'{"model": "m", "prompt": [' + b"{}," * MAX_COMMAS + b"{}]}"

    answer = await said(post(path, many))

    assert answer.refusal == (413, "body_too_large")
    assert "commas" in answer.error["message"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
async def test_a_body_of_the_largest_size_is_read(pack: type[bytes]) -> None:
    body = b'{"model": "m", "nothing": "%s"}'
    filled = pack(body % (b"x" * (MAX_BODY_BYTES - len(body) + 2)))
    encoding = ["Content-Encoding: gzip"] if pack is not bytes else []

    answer = await said(post(CHAT, filled, encoding))

    assert answer.refusal == (400, "unsupported_parameter")


async def test_others_are_served_while_a_large_body_is_decoded() -> None:
    large = b'{"model": "m", "prompt": [%s0]}' % (b"0," * (LARGE_BYTES // 2))

    async with (
        attacked() as port,
        wire(port) as one,
        wire(port) as other,
        asyncio.TaskGroup() as tasks,
    ):
        refused = tasks.create_task(asked(one, post(COMPLETIONS, large)))
        assert (await asked(other, head("GET", "/health"))).status == 200

    assert refused.result().refusal == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("request_line", "refusal"),
    [
        (("GET", "/nowhere"), (404, "not_found")),
        (("GET", "/"), (404, "not_found")),
        (("GET", "/health/"), (404, "not_found")),
        (("GET", "//health"), (404, "not_found")),
        (("GET", "/models//endpoint"), (404, "not_found")),
        (("OPTIONS", "*"), (404, "not_found")),
        (("CONNECT", "example.org:443"), (404, "not_found")),
        (("POST", CHAT + "/"), (404, "not_found")),
        (("GET", CHAT), (405, "method_not_allowed")),
        (("DELETE", "/health"), (405, "method_not_allowed")),
        (("BREW", "/health"), (400, "invalid_request")),
        (("PATCH", "/models/load"), (405, "method_not_allowed")),
        (("POST", "/devices/-1/restart"), (404, "not_found")),
        (("POST", "/devices/99999/restart"), (404, "not_found")),
        (("POST", "/devices/7/restart"), (404, "not_found")),
        (("POST", "/devices/zero/restart"), (404, "not_found")),
    ],
)
async def test_a_path_or_method_that_is_not_there_is_refused(
    request_line: tuple[str, str], refusal: tuple[int, str]
) -> None:
    answer = await said(head(*request_line))

    assert answer.refusal == refusal


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "TLS/1.0"])
async def test_an_upgrade_is_not_made_and_the_request_served(upgrade: str) -> None:
    asking = ["Connection: Upgrade", f"Upgrade: {upgrade}", "HTTP2-Settings: AAMAAABkAAQ"]

    answer = await said(post("/tokenize", b'{"model": "m", "prompt": "a"}', asking))

    assert answer.status == 200


@pytest.mark.parametrize("host", ["\xff\xfe", "h\u00f6st"])
async def test_a_host_of_any_bytes_is_refused_where_it_would_be_passed_on(host: str) -> None:
    sent = f"GET /models/{MODEL}/endpoint HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
    config = NeuronConfig(listen="10.0.0.7:13131")

    async with attacked(config=config) as port, wire(port) as connection:
        answer = await asked(connection, sent)

    assert (answer.refusal, answer.error["param"]) == ((400, "invalid_request"), "Host")


IDS = {
    "NUL": "\0",
    "up": "..",
    "up and away": "../../../etc/passwd",
    "a file": "file:/etc/passwd",
    "a file with a NUL": "file:/etc/\0",
    "a file that is up": "file:../../etc/passwd",
    "a directory": "file:/",
    "a device": "file:/dev/zero",
    "a process": "file:/proc/self/mem",
    "a long file": "file:/" + "x" * 6000,
    "a deep file": "file:" + "/x" * 3000,
    "nobody's home": "file:~nobody-here/x",
    "a hub": "huggingface:../../x/y",
    "a package": "pypi:../../x/y.gguf",
    "a package with a NUL": "pypi:a/\0.gguf",
    "no scheme": ":",
    "a scheme alone": "file:",
    "an unknown scheme": "gopher:x/y",
    "lines": "a\r\nX-Injected: 1",
    "an escape": "\x1b[2J",
    "an emoji": "😀" * 100,
    "right to left": "\u202efdp.exe",
    "slashes": "/" * 100,
    "a question": "a?b=c#d;e",
    "percents": "%00%zz%",
    "spaces": "   ",
    "4 kB": "x" * 4000,
    "7 kB": "x" * 7000,
}


@pytest.mark.parametrize(
    "route", ["/models/{}/endpoint", "/models/{}/capabilities", "/v1/models/{}"]
)
@pytest.mark.parametrize("model_id", IDS.values(), ids=IDS)
async def test_a_path_with_an_odd_model_is_404(tmp_path: Path, route: str, model_id: str) -> None:
    escaped = quote(model_id, safe="")
    if len(escaped) > 8000:
        escaped = model_id

    async with attacked(cache=tmp_path) as port, wire(port) as connection:
        answer = await asked(connection, head("GET", route.format(escaped)))

    assert answer.refusal == (404, "model_not_found")
    assert "x-injected" not in answer.headers


@pytest.mark.parametrize("path", INFERENCE)
@pytest.mark.parametrize("model_id", IDS.values(), ids=IDS)
async def test_a_body_with_an_odd_model_is_404(tmp_path: Path, path: str, model_id: str) -> None:
    rest: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "a"}]},
        "/v1/embeddings": {"input": "a"},
    }
    body = json.dumps({"model": model_id, **rest.get(path, {"prompt": "a"})}).encode()

    async with attacked(cache=tmp_path) as port, wire(port) as connection:
        answer = await asked(connection, post(path, body))

    if len(model_id) > MAX_NAME:
        assert answer.refusal == (400, "invalid_request")
        assert len(answer.body) < 500
    else:
        assert answer.refusal == (404, "model_not_found")


@pytest.mark.parametrize("raw", ["%ff", "%ed%a0%80", "%c0%af", "%", "%2", "%zz", "\xff", "%u0000"])
@pytest.mark.parametrize(
    "route", ["/models/{}/endpoint", "/models/{}/capabilities", "/v1/models/{}"]
)
async def test_a_path_that_is_not_utf_8_is_refused(tmp_path: Path, route: str, raw: str) -> None:
    async with attacked(cache=tmp_path) as port, wire(port) as connection:
        answer = await asked(connection, head("GET", route.format(raw)))

    assert answer.refusal in {(404, "model_not_found"), (400, "invalid_request")}


async def test_two_loads_of_one_model_at_once_are_one() -> None:
    node = FakeNode()
    body = json.dumps({"model_id": "new", "wait": True}).encode()

    async with attacked(node) as port, asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(_loaded(port, body)) for _ in range(8)]

    assert {task.result().status for task in answers} == {200}
    assert list(node.models) == ["new"]


async def _loaded(port: int, body: bytes) -> Answer:
    async with wire(port) as connection:
        return await asked(connection, post("/models/load", body))
