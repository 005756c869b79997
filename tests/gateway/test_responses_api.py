"""OpenAI's Responses through the gateway, over HTTP."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Entitlements, Key, Responses
from cortex.gateway.response_store import OwnResponses
from cortex.ipc.errors import ContextLengthExceeded, Overloaded
from fakes import FakeNeuron, gateway_config
from response_schemas import is_event, is_response

RESPONSES = "/v1/responses"
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "qwen3-8b", "input": "hi"}
STREAM = {**ASK, "stream": True}
COLD = Catalogue({"m": Profile("m")}, {})
KEYS = Entitlements(
    require_auth=True, keys=(Key("sk-laptop-1", "laptop"), Key("sk-phone-1", "phone"))
)
LAPTOP, PHONE = ({"Authorization": f"Bearer sk-{name}-1"} for name in ("laptop", "phone"))


async def ask(
    session: aiohttp.ClientSession,
    gateway: Gateway,
    body: Any = None,
    path: str = "",
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    url = gateway.url + RESPONSES + path
    async with session.request(method, url, json=body, headers=headers) as response:
        text = await response.text()
    return response.status, text if text.startswith(("event", ":")) else orjson.loads(text)


def events(text: str) -> list[dict[str, Any]]:
    """Return the events in *text*, whose numbers and shapes must be right."""
    found = [
        orjson.loads(line.removeprefix("data: "))
        for line in text.split("\n")
        if line.startswith("data: ")
    ]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    for event in found:
        is_event(event)
    return found


async def test_a_response_is_what_strict_clients_expect(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, response = await ask(session, gateway, ASK)

    assert status == 200
    is_response(response)
    assert response["output"][0]["content"][0]["text"] == "Hello world"
    assert response["usage"]["total_tokens"] == 9


async def test_a_stream_is_what_strict_clients_expect(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.keep_alives = 2

    async with Gateway(gateway_config(neuron)) as gateway:
        _, text = await ask(session, gateway, STREAM)

    found = events(text)
    assert found[0]["type"] == "response.created"
    assert found[-1]["type"] == "response.completed"
    assert "[DONE]" not in text
    assert "".join(event.get("delta", "") for event in found) == "Hello world"


async def test_a_response_says_where_it_comes_from(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        for body in (ASK, STREAM):
            async with session.post(gateway.url + RESPONSES, json=body) as response:
                assert response.headers["x-cortex-node"] == "a"
                assert response.headers["x-cortex-reason"]


async def test_its_tokens_are_metered_as_those_of_chat(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        for body in (ASK, STREAM):
            await ask(session, gateway, body)

        metered = (await gateway.metrics.exposition()).decode()

    labels = '{model="qwen3-8b",node="a"}'
    (prompt,) = [line for line in metered.split("\n") if "prompt_tokens_total" + labels in line][:1]
    assert prompt.endswith(" 14.0")


async def test_a_waiting_response_is_queued_until_the_model_has_loaded(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron() as neuron, Gateway(gateway_config(neuron), COLD) as gateway:
        neuron.may_load.clear()
        body = {**STREAM, "model": "m"}
        async with session.post(gateway.url + RESPONSES, json=body) as response:
            so_far = b""
            while so_far.count(b": loading m on a") < 2:
                so_far += await response.content.readany()
            neuron.may_load.set()
            rest = await response.text()

    found = events(so_far.decode() + rest)
    assert [event["type"].removeprefix("response.") for event in found[:4]] == [
        "created",
        "queued",
        "in_progress",
        "output_item.added",
    ]
    assert found[-1]["response"]["status"] == "completed"


async def test_a_load_that_fails_ends_a_waiting_stream(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as neuron, Gateway(gateway_config(neuron), COLD) as gateway:
        neuron.may_load.clear()
        body = {**STREAM, "model": "m"}
        async with session.post(gateway.url + RESPONSES, json=body) as response:
            so_far = b""
            while b"response.queued" not in so_far:
                so_far += await response.content.readany()
            neuron.fails_load = "the disk is full"
            neuron.may_load.set()
            rest = await response.text()

    last = events(so_far.decode() + rest)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"].endswith("the disk is full")


@pytest.mark.parametrize(
    "failing", ["dies_after_tokens", "fails_after_tokens", "ends_after_tokens"]
)
async def test_a_stream_that_breaks_ends_with_a_failed_response(
    neuron: FakeNeuron, session: aiohttp.ClientSession, failing: str
) -> None:
    setattr(neuron, failing, 1)

    async with Gateway(gateway_config(neuron)) as gateway:
        _, text = await ask(session, gateway, STREAM)

    found = events(text)
    assert found[-1]["type"] == "response.failed"
    assert found[-1]["response"]["error"]["code"] == "node_failed"
    assert [event.get("delta") for event in found].count("Hello") == 1
    assert "response.completed" not in text


async def test_an_error_before_the_stream_is_in_openais_envelope(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        neuron.refuses = ContextLengthExceeded.of(9000, 8192)
        long_status, too_long = await ask(session, gateway, STREAM)
        neuron.refuses = Overloaded("full")
        full_status, full = await ask(session, gateway, ASK)
        status, unknown = await ask(session, gateway, {**ASK, "model": "x"})

    assert (long_status, too_long["error"]["code"]) == (400, "context_length_exceeded")
    assert (full_status, full["error"]["code"]) == (503, "overloaded")
    assert (status, unknown["error"]["code"]) == (404, "model_not_found")


async def test_an_answer_that_is_none_is_502(session: aiohttp.ClientSession) -> None:
    class Odd(FakeNeuron):
        def _whole(self, body: dict[str, Any], path: str) -> dict[str, Any]:
            return {"path": path, **body}

    async with Odd(["qwen3-8b"]) as neuron, Gateway(gateway_config(neuron)) as gateway:
        status, body = await ask(session, gateway, ASK)

    assert (status, body["error"]["code"]) == (502, "node_failed")


async def test_the_client_sees_the_name_it_asked_for(session: aiohttp.ClientSession) -> None:
    source = "file:/srv/private/x.gguf"
    catalogue = Catalogue({"house": Profile("house", source=source)}, {})

    async with FakeNeuron([source]) as neuron, Gateway(gateway_config(neuron), catalogue) as g:
        _, whole = await ask(session, g, {**ASK, "model": "house"})
        _, text = await ask(session, g, {**STREAM, "model": "house"})

    assert whole["model"] == "house"
    assert "private" not in text
    assert neuron.received[0].body["model"] == source


@pytest.mark.parametrize("first", [ASK, STREAM])
async def test_a_conversation_goes_on_from_a_response(
    neuron: FakeNeuron, session: aiohttp.ClientSession, first: dict[str, Any]
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, said = await ask(session, gateway, {**first, "instructions": "Be terse."})
        response = said if isinstance(said, dict) else events(said)[-1]["response"]
        onwards = {"previous_response_id": response["id"]}
        status, second = await ask(session, gateway, {**ASK, "input": "And?", **onwards})

    assert (status, second["previous_response_id"]) == (200, response["id"])
    assert neuron.received[1].body["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello world"},
        {"role": "user", "content": "And?"},
    ]


async def test_a_conversation_goes_on_after_a_restart(
    neuron: FakeNeuron, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    state = tmp_path / "cortex.db"
    async with Gateway(gateway_config(neuron), state=state) as gateway:
        _, first = await ask(session, gateway, ASK)
    async with Gateway(gateway_config(neuron), state=state) as gateway:
        status, _ = await ask(session, gateway, {**ASK, "previous_response_id": first["id"]})

    assert (status, len(neuron.received[1].body["messages"])) == (200, 3)


@pytest.mark.parametrize("failing", [{"store": False}, {}])
async def test_what_is_not_stored_is_not_there(
    neuron: FakeNeuron, session: aiohttp.ClientSession, failing: dict[str, Any]
) -> None:
    limits = Responses() if failing else Responses(max_stored=0)
    async with Gateway(gateway_config(neuron, responses=limits)) as gateway:
        _, first = await ask(session, gateway, {**ASK, **failing})
        status, onwards = await ask(session, gateway, {**ASK, "previous_response_id": first["id"]})
        shown, _ = await ask(session, gateway, path=f"/{first['id']}", method="GET")

    assert first["store"] is False
    assert (status, onwards["error"]["code"]) == (400, "previous_response_not_found")
    assert shown == 404


async def test_a_response_that_failed_is_not_stored(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.fails_after_tokens = 1

    async with Gateway(gateway_config(neuron)) as gateway:
        _, text = await ask(session, gateway, STREAM)
        name = events(text)[-1]["response"]["id"]
        status, _ = await ask(session, gateway, path=f"/{name}", method="GET")

    assert status == 404


async def test_what_goes_on_from_a_response_is_read_beside_the_event_loop(
    neuron: FakeNeuron, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    conversation = OwnResponses.conversation

    def spy(own: OwnResponses, last: str) -> list[dict[str, Any]]:
        threads.append(threading.get_ident())
        return conversation(own, last)

    monkeypatch.setattr(OwnResponses, "conversation", spy)

    async with Gateway(gateway_config(neuron)) as gateway:
        _, first = await ask(session, gateway, ASK)
        status, _ = await ask(session, gateway, {**ASK, "previous_response_id": first["id"]})

    assert (status, threads == [threading.get_ident()]) == (200, False)


async def test_another_keys_responses_are_not_there(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron, entitlements=KEYS)) as gateway:
        _, first = await ask(session, gateway, ASK, headers=LAPTOP)
        path, onwards = f"/{first['id']}", {**ASK, "previous_response_id": first["id"]}
        seen = [
            (await ask(session, gateway, onwards, headers=PHONE))[0],
            (await ask(session, gateway, path=path, method="GET", headers=PHONE))[0],
            (await ask(session, gateway, path=path, method="DELETE", headers=PHONE))[0],
            (await ask(session, gateway, path=path, method="GET", headers=LAPTOP))[0],
            (await ask(session, gateway, path=path, method="GET"))[0],
        ]

    assert seen == [400, 404, 404, 200, 401]


async def test_a_stored_response_is_shown_as_it_was_answered(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, first = await ask(session, gateway, ASK)
        _, shown = await ask(session, gateway, path=f"/{first['id']}", method="GET")
        path = f"/{first['id']}?stream=true"
        status, refused = await ask(session, gateway, path=path, method="GET")

    assert shown == first
    assert (status, refused["error"]["param"]) == (400, "stream")


async def test_a_deleted_response_is_gone(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, first = await ask(session, gateway, ASK)
        path = f"/{first['id']}"
        deleted = await ask(session, gateway, path=path, method="DELETE")
        again = await ask(session, gateway, path=path, method="DELETE")

    assert deleted == (200, {"id": first["id"], "object": "response", "deleted": True})
    assert (again[0], again[1]["error"]["code"]) == (404, "response_not_found")


async def page(session: aiohttp.ClientSession, gateway: Gateway, name: str, query: str) -> Any:
    return (await ask(session, gateway, path=f"/{name}/input_items{query}", method="GET"))[1]


async def test_what_came_in_is_listed_in_pages(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    items = [{"role": "user", "content": text, "id": f"msg_{text}"} for text in "abc"]

    async with Gateway(gateway_config(neuron)) as gateway:
        _, first = await ask(session, gateway, {**ASK, "input": items})
        newest = await page(session, gateway, first["id"], "?limit=2")
        rest = await page(session, gateway, first["id"], "?limit=2&after=msg_b")
        oldest = await page(session, gateway, first["id"], "?order=asc")
        beyond = await page(session, gateway, first["id"], "?after=msg_a")

    assert [item["id"] for item in newest["data"]] == ["msg_c", "msg_b"]
    assert (newest["first_id"], newest["last_id"], newest["has_more"]) == ("msg_c", "msg_b", True)
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (["msg_a"], False)
    assert [item["id"] for item in oldest["data"]] == ["msg_a", "msg_b", "msg_c"]
    assert (beyond["data"], beyond["first_id"], beyond["has_more"]) == ([], None, False)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("order=up", "order"),
        ("after=msg_9", "after"),
    ],
)
async def test_a_page_that_is_none_is_refused(
    neuron: FakeNeuron, session: aiohttp.ClientSession, query: str, param: str
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, first = await ask(session, gateway, ASK)
        found = await page(session, gateway, first["id"], f"?{query}")

    assert found["error"]["param"] == param


async def test_a_client_that_leaves_stops_the_node(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway:
        async with session.post(gateway.url + RESPONSES, json=STREAM) as response:
            await response.content.readany()
        async with asyncio.timeout(5):
            await neuron.cancelled.wait()


# What Codex sends, recorded: developer first, no instructions, tools of kinds that we lack.
EXEC = {
    "type": "function",
    "name": "exec_command",
    "description": "Runs a command.",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}},
}
SPAWN = {"type": "function", "name": "spawn_agent", "description": "Starts one.", "strict": False}
CODEX: dict[str, Any] = {
    "model": "qwen3-8b",
    "stream": True,
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "You are Codex. " * 1200}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "<environment_context/>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "List the files."}],
        },
    ],
    "tools": [
        EXEC,
        {
            "type": "namespace",
            "name": "multi_agent_v1",
            "description": "Agents.",
            "tools": [SPAWN],
        },
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-session",
    "client_metadata": {"x-codex-installation-id": "1"},
}
CODEX_HEADERS = {"session-id": "0199", "thread-id": "0199", "originator": "codex_exec"}


def calls(index: int, name: str, arguments: str) -> list[dict[str, Any]]:
    begin = {"name": name, "arguments": ""}
    return [
        {"tool_calls": [{"index": index, "id": f"call_{index}", "function": begin}]},
        *({"tool_calls": [{"index": index, "function": {"arguments": c}}]} for c in arguments),
    ]


async def test_codex_goes_round_its_tool_loop(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.deltas = [
        {"reasoning_content": "Files"},
        {"reasoning_content": "?"},
        {"content": "Looking."},
        *calls(0, "exec_command", '{"cmd":"ls"}'),
        *calls(1, "multi_agent_v1__spawn_agent", "{}"),
    ]
    neuron.finish_reason = "tool_calls"

    async with Gateway(gateway_config(neuron)) as gateway:
        status, text = await ask(session, gateway, CODEX, headers=CODEX_HEADERS)
        # It keeps what the done events say, and answers the calls.
        said = [e["item"] for e in events(text) if e["type"] == "response.output_item.done"]
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "a.txt"}
            for item in said
            if item["type"] == "function_call"
        ]
        sealed = [
            {**item, "encrypted_content": None} if item["type"] == "reasoning" else item
            for item in said
        ]
        again = {**CODEX, "input": [*CODEX["input"], *sealed, *results]}
        second_status, _ = await ask(session, gateway, again, headers=CODEX_HEADERS)

    assert (status, second_status) == (200, 200)
    assert [item.get("namespace") for item in said] == [None, None, None, "multi_agent_v1"]
    assert said[3]["name"] == "spawn_agent"
    one, two = (request.body for request in neuron.requests(CHAT))
    assert [tool["function"]["name"] for tool in one["tools"]] == [
        "exec_command",
        "multi_agent_v1__spawn_agent",
    ]
    assert [message["role"] for message in one["messages"]] == ["developer", "user", "user"]
    assert two["messages"][:3] == one["messages"]
    turn, *tools = two["messages"][3:]
    assert (turn["reasoning_content"], turn["content"]) == ("Files?", "Looking.")
    assert [call["function"] for call in turn["tool_calls"]] == [
        {"name": "exec_command", "arguments": '{"cmd":"ls"}'},
        {"name": "multi_agent_v1__spawn_agent", "arguments": "{}"},
    ]
    assert [(tool["tool_call_id"], tool["content"]) for tool in tools] == [
        ("call_0", "a.txt"),
        ("call_1", "a.txt"),
    ]


async def test_what_is_counted_is_the_prompt_that_the_call_has(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, first = await ask(session, gateway, ASK)
        onwards = {**ASK, "input": "And?", "previous_response_id": first["id"]}
        body = {
            **onwards,
            "instructions": "Be terse.",
            "reasoning": {"effort": "low"},
            "tools": [{"type": "function", "name": "ls", "parameters": {"type": "object"}}],
            "tool_choice": "required",
            "chat_template_kwargs": {"enable_thinking": False},
        }
        counted = await ask(session, gateway, body, "/input_tokens")
        await ask(session, gateway, body)

    assert counted == (200, {"object": "response.input_tokens", "input_tokens": 7})
    _, counting, called = (it.body for it in neuron.received)
    assert counting["messages"] == called["messages"]
    assert len(counting["messages"]) == 4
    assert counting == {
        name: called[name]
        for name in (
            "model",
            "messages",
            "tools",
            "tool_choice",
            "reasoning_effort",
            "chat_template_kwargs",
        )
    }


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"previous_response_id": "resp_x"}, "previous_response_not_found"),
        ({"truncation": "auto"}, "unsupported_parameter"),
        ({"model": "other"}, "model_not_found"),
    ],
)
async def test_what_cannot_be_counted_is_refused_as_the_call_is(
    neuron: FakeNeuron, session: aiohttp.ClientSession, more: dict[str, Any], code: str
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        counted = await ask(session, gateway, {**ASK, **more}, "/input_tokens")
        called = await ask(session, gateway, {**ASK, **more})

    assert counted[0] == called[0]
    assert counted[1]["error"]["code"] == called[1]["error"]["code"] == code
