"""One question asked in every way that OpenAI's and Anthropic's SDKs have, types checked strictly.

    chat, responses, messages 2023-06-01, messages 2026-10-21      each whole and streamed,
                                                                   blocking and asyncio

``Said`` is what they have in common, so that the answers can be held against one another.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anthropic
import openai

VERSIONS = ("2023-06-01", "2026-10-21")
MAX_TOKENS = 300


@dataclass(frozen=True)
class Tool:
    """A function to offer; each of its parameters is a string that it needs."""

    name: str
    parameters: tuple[str, ...] = ()

    @property
    def schema(self) -> dict[str, Any]:
        """Its parameters as JSON schema."""
        return {
            "type": "object",
            "properties": {name: {"type": "string"} for name in self.parameters},
            "required": list(self.parameters),
            "additionalProperties": False,
        }

    @property
    def function(self) -> dict[str, Any]:
        """It as a function of OpenAI's."""
        named = {"name": self.name, "description": f"Does {self.name}."}
        return {**named, "parameters": self.schema, "strict": True}


@dataclass(frozen=True)
class Question:
    """A question in one turn; *choice* is ``auto``, ``none``, ``required`` or a tool's name."""

    text: str
    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    is_parallel: bool = True
    system: str = ""


@dataclass(frozen=True)
class Said:
    """An answer; calls are names and arguments, *prompt_tokens* those of a cache too."""

    text: str
    reasoning: str
    calls: list[tuple[str, Any]]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Way:
    """A dialect with its *version*, if it has several, and how to ask in it."""

    dialect: str
    streams: bool
    is_async: bool
    version: str = ""

    def __str__(self) -> str:
        how = ("streamed" if self.streams else "whole", "async" if self.is_async else "sync")
        return " ".join([self.dialect, *filter(None, [self.version]), *how])

    def client(self, url: str) -> Any:
        """Return the SDK's client, which refuses what is not of its types."""
        strict: Any = {"api_key": "k", "max_retries": 0, "_strict_response_validation": True}
        if self.dialect == "messages":
            headers = {"anthropic-version": self.version}
            kind: Any = anthropic.AsyncAnthropic if self.is_async else anthropic.Anthropic
            return kind(base_url=url, default_headers=headers, **strict)
        kind = openai.AsyncOpenAI if self.is_async else openai.OpenAI
        return kind(base_url=f"{url}/v1", **strict)

    def ask(self, url: str, model: str, question: Question) -> Said:
        """Return the answer to *question* of a gateway at *url*."""
        request, read = DIALECTS[self.dialect]
        return read(asyncio.run(self._ask(url, request(model, question))))

    async def _ask(self, url: str, request: dict[str, Any]) -> Any:
        client = self.client(url)
        try:
            return await self._answer(client, request)
        finally:
            await _settled(client.close())

    async def _answer(self, client: Any, request: dict[str, Any]) -> Any:
        place = client.chat.completions if self.dialect == "chat" else getattr(client, self.dialect)
        if not self.streams:
            return await _settled(place.create(**request))
        if self.dialect == "chat":
            request |= {"stream_options": {"include_usage": True}}
        if self.is_async:
            async with place.stream(**request) as stream:
                return await self._final(stream)()
        with place.stream(**request) as stream:
            return self._final(stream)()

    def _final(self, stream: Any) -> Callable[[], Any]:
        names = {"chat": "completion", "responses": "response", "messages": "message"}
        found: Callable[[], Any] = getattr(stream, f"get_final_{names[self.dialect]}")
        return found


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


WAYS = [
    Way(dialect, streams, is_async, version)
    for dialect, versions in (("chat", ("",)), ("responses", ("",)), ("messages", VERSIONS))
    for version in versions
    for streams in (False, True)
    for is_async in (False, True)
]


def chat_request(model: str, question: Question) -> dict[str, Any]:
    """Return *question* as chat has it."""
    request: dict[str, Any] = {"model": model, "messages": _turns(question)}
    request["max_completion_tokens"] = MAX_TOKENS
    if question.tools:
        tools = [{"type": "function", "function": tool.function} for tool in question.tools]
        named = {"type": "function", "function": {"name": question.choice}}
        request |= _offer(question, tools, named)
    return request


def said_in_chat(answer: Any) -> Said:
    """Return what a chat completion says."""
    message, usage = answer.choices[0].message, answer.usage
    calls = [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or []
    ]
    reasoning = (message.model_extra or {}).get("reasoning_content") or ""
    return Said(
        message.content or "", reasoning, calls, usage.prompt_tokens, usage.completion_tokens
    )


def responses_request(model: str, question: Question) -> dict[str, Any]:
    """Return *question* as Responses have it."""
    request: dict[str, Any] = {"model": model, "input": _turns(question)}
    request["max_output_tokens"] = MAX_TOKENS
    if question.tools:
        tools = [{"type": "function", **tool.function} for tool in question.tools]
        request |= _offer(question, tools, {"type": "function", "name": question.choice})
    return request


def said_in_response(response: Any) -> Said:
    """Return what a response says."""
    by_type: dict[str, list[Any]] = {"reasoning": [], "function_call": []}
    for item in response.output:
        by_type.setdefault(item.type, []).append(item)
    reasoning = "".join(part.text for item in by_type["reasoning"] for part in item.content or [])
    calls = [(call.name, json.loads(call.arguments)) for call in by_type["function_call"]]
    usage = response.usage
    return Said(response.output_text, reasoning, calls, usage.input_tokens, usage.output_tokens)


def messages_request(model: str, question: Question) -> dict[str, Any]:
    """Return *question* as Anthropic has it."""
    request: dict[str, Any] = {"model": model, "max_tokens": MAX_TOKENS}
    request["messages"] = [{"role": "user", "content": question.text}]
    if question.system:
        request["system"] = question.system
    if question.tools:
        words = {"auto": "auto", "none": "none", "required": "any"}
        choice: dict[str, Any] = {"type": words.get(question.choice, "tool")}
        if choice["type"] == "tool":
            choice["name"] = question.choice
        if not question.is_parallel:
            choice["disable_parallel_tool_use"] = True
        request["tools"] = [_anthropic_tool(tool) for tool in question.tools]
        request["tool_choice"] = choice
    return request


def said_in_message(message: Any) -> Said:
    """Return what a message says."""
    blocks, usage = message.content, message.usage
    return Said(
        "".join(block.text for block in blocks if block.type == "text"),
        "".join(block.thinking for block in blocks if block.type == "thinking"),
        [(block.name, block.input) for block in blocks if block.type == "tool_use"],
        usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens,
        usage.output_tokens,
    )


DIALECTS: dict[str, tuple[Callable[[str, Question], dict[str, Any]], Callable[[Any], Said]]] = {
    "chat": (chat_request, said_in_chat),
    "responses": (responses_request, said_in_response),
    "messages": (messages_request, said_in_message),
}


def _turns(question: Question) -> list[dict[str, Any]]:
    turn = {"role": "user", "content": question.text}
    return [{"role": "system", "content": question.system}, turn] if question.system else [turn]


def _offer(
    question: Question, tools: list[dict[str, Any]], named: dict[str, Any]
) -> dict[str, Any]:
    is_word = question.choice in ("auto", "none", "required")
    choice = question.choice if is_word else named
    return {
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": question.is_parallel,
    }


def _anthropic_tool(tool: Tool) -> dict[str, Any]:
    said = tool.function
    return {
        "name": said["name"],
        "description": said["description"],
        "input_schema": said["parameters"],
        "strict": True,
    }
