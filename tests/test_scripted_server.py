"""The scripted server answers what was written down, in order, and remembers what it was asked."""

from __future__ import annotations

import http.client
import json
from typing import Any

from scripted_server import ScriptedServer


def ask(server: ScriptedServer, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Return status and body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path, body=json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_replies_come_in_turn_and_the_last_one_stays() -> None:
    with ScriptedServer({"GET /": [(503, {}), (200, [1])]}) as server:
        answers = [ask(server, "GET", "/") for _ in range(3)]

    assert answers == [(503, b"{}"), (200, b"[1]"), (200, b"[1]")]


def test_bytes_are_sent_as_they_are() -> None:
    with ScriptedServer({"GET /": [(200, b"<html>")]}) as server:
        assert ask(server, "GET", "/") == (200, b"<html>")


def test_a_route_that_nobody_wrote_down_is_404() -> None:
    with ScriptedServer({}) as server:
        assert ask(server, "GET", "/nowhere")[0] == 404


def test_what_was_posted_is_remembered() -> None:
    with ScriptedServer({"POST /a": [(200, {})]}) as server:
        ask(server, "POST", "/a", {"n": 1})
        ask(server, "POST", "/a", {"n": 2})

    assert server.bodies("POST /a") == [{"n": 1}, {"n": 2}]
