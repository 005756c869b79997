"""Anthropic's Messages through the gateway, over HTTP."""

import asyncio
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import Anthropic
from cortex.ipc.errors import (
    ApiError,
    ContextLengthExceeded,
    InsufficientQuota,
    Overloaded,
    PromptTooLongForMemory,
    RateLimitExceeded,
)
from fakes import QUICK, FakeNeuron, gateway_config, refusal, until

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
ASK: dict[str, Any] = {
    "model": "qwen3-8b",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
}
STREAM = {**ASK, "stream": True}


TOOLS = [
    {"name": "Bash", "description": "Runs.", "input_schema": {"type": "object"}},
    {"name": "Agent", "input_schema": {"type": "object"}, "defer_loading": True},
    {"name": "Read", "input_schema": {"type": "object"}, "eager_input_streaming": True},
]
CLAUDE_CODE: dict[str, Any] = {
    "model": "qwen3-8b",
    "stream": True,
    "max_tokens": 32000,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; x=136;"},
        {"type": "text", "text": "You are.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "system", "content": "Reminder.", "output_config": {"effort": "high"}},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "tool_use", "id": "t0", "name": "Bash", "input": {"command": "ls"}},
                {"type": "tool_use", "id": "t1", "name": "ToolSearch", "input": {"query": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t0",
                    "content": "a b",
                    "is_error": False,
                    "cache_control": {"type": "ephemeral"},
                },
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "tool_reference", "tool_name": "Agent"}],
                },
                {"type": "text", "text": "Go on.", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ],
    "tools": TOOLS,
    "metadata": {"user_id": '{"session_id": "s"}'},
    "thinking": {"type": "adaptive", "display": "omitted"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "medium"},
    "safeguards": [],
}
HEADERS_OF_CLAUDE_CODE = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "x-app": "cli",
    "X-Claude-Code-Session-Id": "s",
}


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, body: Any, path: str = MESSAGES
) -> tuple[int, Any]:
    async with session.post(gateway.url + path, json=body) as response:
        text = await response.text()
    return response.status, text if text.startswith(("event", ":")) else orjson.loads(text)


async def test_what_claude_code_sends_is_answered(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    session.headers.update(HEADERS_OF_CLAUDE_CODE)

    async with Gateway(gateway_config(neuron)) as gateway:
        status, text = await ask(session, gateway, CLAUDE_CODE, MESSAGES + "?beta=true")

    assert (status, text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')) == (
        200,
        True,
    )
    asked = neuron.requests("/v1/chat/completions")[0].body
    assert [(turn["role"], turn["content"]) for turn in asked["messages"]] == [
        ("system", "You are."),
        ("user", "hi"),
        ("system", "Reminder."),
        ("assistant", ""),
        ("tool", "a b"),
        ("tool", "Agent"),
        ("user", "Go on."),
    ]
    assert asked["messages"][3]["reasoning_content"] == "Hm."
    assert [tool["function"]["name"] for tool in asked["tools"]] == ["Bash", "Read", "Agent"]
    assert (asked["thinking"], asked["reasoning_effort"]) == ({"type": "adaptive"}, "high")


async def test_what_is_counted_is_what_the_answer_is_asked_with(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await ask(session, gateway, CLAUDE_CODE)
        await ask(session, gateway, CLAUDE_CODE, COUNT)

    before_the_answer, counted = (request.body for request in neuron.requests("/tokenize"))
    answered = neuron.requests("/v1/chat/completions")[0].body
    assert before_the_answer == counted
    assert counted.items() <= answered.items()
    assert answered.keys() - counted.keys() == {"max_tokens", "stream", "stream_options"}


async def test_two_dozen_counts_at_once_are_all_answered(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        bodies = [{**ASK, "tools": [tool]} for tool in TOOLS * 8]
        answers = await asyncio.gather(*(ask(session, gateway, body, COUNT) for body in bodies))

    assert answers == [(200, {"input_tokens": 7})] * 24


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21", "2031-01-01", None])
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
async def test_every_version_is_answered(
    neuron: FakeNeuron, session: aiohttp.ClientSession, version: str | None, path: str
) -> None:
    session.headers.update({"anthropic-version": version} if version else {})

    async with Gateway(gateway_config(neuron)) as gateway:
        status, _ = await ask(session, gateway, ASK, path)

    assert status == 200


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
async def test_a_version_that_is_no_date_is_refused_in_words(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str
) -> None:
    session.headers["anthropic-version"] = "v1"

    async with Gateway(gateway_config(neuron)) as gateway:
        status, body = await ask(session, gateway, ASK, path)

    assert (status, body["error"]["param"]) == (400, "anthropic-version")
    assert "'v1' is no version" in body["error"]["message"]


async def test_the_billing_block_stays_where_the_operator_wants_it(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    kept = gateway_config(neuron, anthropic=Anthropic(strip_billing_block=False))
    async with Gateway(kept) as gateway:
        await ask(session, gateway, {**ASK, "system": "x-anthropic-billing-header: x"})

    assert neuron.received[0].body["messages"][0]["content"] == "x-anthropic-billing-header: x"


async def test_a_stream_is_translated_while_it_forms(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + MESSAGES, json=STREAM) as response,
    ):
        so_far = b""
        while b"Hello" not in so_far:
            so_far += await response.content.readany()
        neuron.may_finish.set()
        rest = await response.read()

    assert b"message_stop" not in so_far
    assert b"message_stop" in rest


async def test_keep_alives_of_the_node_become_pings(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.keep_alives = 3

    async with Gateway(gateway_config(neuron)) as gateway:
        _, text = await ask(session, gateway, STREAM)

    assert text.count("event: ping\n") == 3


async def test_the_prompts_tokens_are_counted_beside_the_answer(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.prompt_tokens = 42

    async with Gateway(gateway_config(neuron)) as gateway:
        _, text = await ask(session, gateway, STREAM)

    assert '"input_tokens":42' in text.split("\n\n")[0]


async def test_the_prompts_tokens_are_counted_before_the_node_answers(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_begin.clear()

    async with Gateway(gateway_config(neuron)) as gateway, asyncio.TaskGroup() as group:
        asking = group.create_task(ask(session, gateway, STREAM))
        await until(lambda: neuron.requests("/tokenize") != [])
        neuron.may_begin.set()
        status, _ = await asking

    assert status == 200


async def test_a_count_that_a_refusal_makes_pointless_is_given_up(
    session: aiohttp.ClientSession,
) -> None:
    class SlowToCount(FakeNeuron):
        async def _tokenize(self, request: Any) -> Any:
            await self._note(request)
            self.refuses = Overloaded("full")
            self.may_begin.set()
            await asyncio.Event().wait()

    async with SlowToCount(["qwen3-8b"]) as slow, Gateway(gateway_config(slow)) as gateway:
        slow.may_begin.clear()
        async with asyncio.timeout(QUICK.control_seconds / 2):
            status, _ = await ask(session, gateway, STREAM)

    assert status == 529


async def test_a_node_that_cannot_count_tells_at_the_end(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    class Innumerate(FakeNeuron):
        async def _tokenize(self, request: Any) -> Any:
            await self._note(request)
            return await self._health(request)

    async with Innumerate(["qwen3-8b"]) as other, Gateway(gateway_config(other)) as gateway:
        _, text = await ask(session, gateway, STREAM)

    first, *_, last, _, _ = text.split("\n\n")
    assert '"input_tokens":0' in first
    assert '"input_tokens":7' in last


async def test_an_alias_reaches_the_node_by_its_real_name(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    catalogue = Catalogue({}, {"claude-local": "qwen3-8b"})

    async with Gateway(gateway_config(neuron), catalogue) as gateway:
        for body in (ASK, STREAM):
            await ask(session, gateway, {**body, "model": "claude-local"})
        await ask(session, gateway, {**ASK, "model": "claude-local"}, COUNT)

    assert {request.body["model"] for request in neuron.received} == {"qwen3-8b"}


async def test_overloaded_is_529_to_anthropic_clients(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.refuses = Overloaded("the queue is full", retry_after_seconds=3)

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + MESSAGES, json=STREAM) as response,
    ):
        body = await response.json()

    assert (response.status, response.headers["Retry-After"]) == (529, "3")
    assert body["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize(
    "refused",
    [
        ContextLengthExceeded.of(9000, 8192),
        PromptTooLongForMemory("no", extras={"prompt_tokens": 9000, "cache_tokens": 8192}),
    ],
    ids=str,
)
async def test_a_prompt_that_is_too_long_is_said_in_the_known_words(
    neuron: FakeNeuron, session: aiohttp.ClientSession, refused: ApiError
) -> None:
    neuron.refuses = refused

    async with Gateway(gateway_config(neuron)) as gateway:
        status, body = await ask(session, gateway, ASK)

    assert status == refused.status
    assert body["error"]["message"] == "prompt is too long: 9000 tokens > 8192 maximum"


@pytest.mark.parametrize(
    ("refused", "should_retry"),
    [
        (Overloaded("full", retry_after_seconds=300), "true"),
        (RateLimitExceeded("spent", retry_after_seconds=60), "true"),
        (RateLimitExceeded("spent"), "true"),
        (RateLimitExceeded("spent", retry_after_seconds=61), "false"),
        (InsufficientQuota("spent"), "false"),
        (ContextLengthExceeded.of(2, 1), None),
    ],
    ids=str,
)
async def test_sdks_are_told_whether_to_sleep_and_try_again(
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    refused: ApiError,
    should_retry: str | None,
) -> None:
    neuron.refuses = refused

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + MESSAGES, json=ASK) as response,
    ):
        assert response.headers.get("x-should-retry") == should_retry


@pytest.mark.parametrize(
    "failing", ["dies_after_tokens", "fails_after_tokens", "ends_after_tokens"]
)
async def test_a_stream_that_breaks_ends_with_an_error_event(
    neuron: FakeNeuron, session: aiohttp.ClientSession, failing: str
) -> None:
    setattr(neuron, failing, 1)

    async with Gateway(gateway_config(neuron)) as gateway:
        _, text = await ask(session, gateway, STREAM)

    *_, last, rest = text.split("\n\n")
    assert last.startswith('event: error\ndata: {"type":"error","error":{"type":"api_error"')
    assert (rest, "message_stop" in text) == ("", False)


async def test_an_answer_that_is_none_is_502(session: aiohttp.ClientSession) -> None:
    class Odd(FakeNeuron):
        def _whole(self, body: dict[str, Any], path: str) -> dict[str, Any]:
            return {"path": path, **body}

    async with Odd(["qwen3-8b"]) as odd, Gateway(gateway_config(odd)) as gateway:
        status, body = await ask(session, gateway, ASK)

    assert (status, body["error"]["code"]) == (502, "node_failed")


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
async def test_a_bad_body_is_refused_in_anthropics_envelope(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, body = await ask(session, gateway, {**ASK, "tools": [{}]}, path)

    assert (status, body["type"], body["error"]["param"]) == (400, "error", "tools.0.name")
    assert neuron.received == []


async def test_a_client_that_leaves_cancels_its_message_at_the_node(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway:
        response = await session.post(gateway.url + MESSAGES, json=STREAM)
        response.close()

        await until(neuron.cancelled.is_set)


async def test_tokens_are_counted(neuron: FakeNeuron, session: aiohttp.ClientSession) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        answer = await ask(session, gateway, {**ASK, "max_tokens": 1}, COUNT)

    assert answer == (200, {"input_tokens": 7})
    assert neuron.requests("/tokenize")[0].body["messages"] == ASK["messages"]


async def test_tokens_are_counted_by_whoever_has_the_tokeniser(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(name="a") as a, FakeNeuron(name="b") as b:
        b.cached_models = {"qwen3-8b"}
        async with Gateway(gateway_config(a, b)) as gateway:
            answer = await ask(session, gateway, ASK, COUNT)

    assert answer == (200, {"input_tokens": 7})


async def test_tokens_of_a_model_nobody_has_are_404(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, body = await ask(session, gateway, {**ASK, "model": "x"}, COUNT)

    assert (status, body["error"]["type"]) == (404, "not_found_error")


async def test_without_a_node_that_is_up_nothing_is_counted(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    await neuron.stop()

    async with Gateway(gateway_config(neuron)) as gateway:
        status, _ = await ask(session, gateway, ASK, COUNT)

    assert status == 503


async def test_a_node_that_breaks_while_counting_is_502(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    patient = gateway_config(neuron, timeouts=msgspec.structs.replace(QUICK, poll_seconds=60))
    async with Gateway(patient) as gateway:
        await gateway.poller.first_round()
        await neuron.stop()
        status, _ = await ask(session, gateway, ASK, COUNT)

    assert status == 502


async def test_a_node_that_cannot_count_is_502(session: aiohttp.ClientSession) -> None:
    class Innumerate(FakeNeuron):
        async def _tokenize(self, request: Any) -> Any:
            return await self._health(request)

    async with Innumerate(["qwen3-8b"]) as other, Gateway(gateway_config(other)) as gateway:
        status, body = await ask(session, gateway, ASK, COUNT)

    assert (status, body["error"]["message"]) == (502, "node a did not answer with a count")


async def test_a_nodes_refusal_to_count_is_passed_on(session: aiohttp.ClientSession) -> None:
    class Strict(FakeNeuron):
        async def _tokenize(self, request: Any) -> Any:
            await self._note(request)
            return refusal(ContextLengthExceeded.of(9, 8))

    async with Strict(["qwen3-8b"]) as strict, Gateway(gateway_config(strict)) as gateway:
        status, _ = await ask(session, gateway, ASK, COUNT)

    assert status == 400
