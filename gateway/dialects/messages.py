"""Anthropic's Messages: one call, as the node's chat request, and its answer.

    client                               node
    system, messages                     messages (message_turns.py, message_blocks.py)
    tools, tool_choice                   tools, tool_choice, parallel_tool_calls (message_tools.py)
    thinking, output_config.effort       thinking, reasoning_effort; the node's one rule decides
    output_config.format                 response_format, which the node enforces
    stop_sequences                       stop
    max_tokens, also 0                   max_tokens; 0 only fills the node's cache
    temperature, top_p, top_k            the same
    a last turn of the assistant         is continued: continue_final_message
    metadata.user_id                     the session that routing keeps together

What is accepted and does nothing is listed in ``message_request.py``; the prompt is neither added
to nor taken from, but for what ``message_turns.py`` names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import structlog

from cortex.gateway.affinity import head_of, named_in_body
from cortex.gateway.dialects.anthropic import ANTHROPIC, Anthropic
from cortex.gateway.dialects.chat_request import (
    ChatFields,
    chat_body,
    count_body,
    encoded,
    refusal_of,
)
from cortex.gateway.dialects.dialect import CountTokens
from cortex.gateway.dialects.message_answers import Expected, Json, message_of
from cortex.gateway.dialects.message_events import MessageEvents
from cortex.gateway.dialects.message_request import MessagesRequest, decode_request
from cortex.gateway.dialects.message_tools import offer_of, tools_of
from cortex.gateway.dialects.message_turns import chat_messages
from cortex.ipc.errors import ApiError, InvalidRequest, MalformedJson, UnsupportedParameter

CLIENTS_WORDS = {"image_url": "image", "reasoning_effort": "output_config.effort"}
"""For those of a chat request."""
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k")

log = structlog.get_logger()


@dataclass(frozen=True)
class MessagesCall:
    """A call whose answer is translated."""

    model: str
    wants_stream: bool
    chat: ChatFields
    """The chat request, but for the model."""
    expected: Expected
    affinity: str | None = None
    output_limit: int | None = None
    path: str = "/v1/chat/completions"
    dialect: Anthropic = field(default=ANTHROPIC)
    stay_seconds: float | None = None
    is_translated: bool = True

    def keep_alive(self, text: str) -> bytes:
        """Return a ``ping``."""
        return self.dialect.keep_alive(text)

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return the ``error`` event."""
        return self.dialect.error_frame(error, request_id)

    def refusal(self, error: ApiError) -> ApiError:
        """Return *error* in the client's words."""
        return refusal_of(error, CLIENTS_WORDS)

    def body(self, node_id: str) -> bytes:
        """Return the chat request."""
        return chat_body(self.chat, node_id, wants_stream=self.wants_stream)

    def answer(self, node_id: str, body: bytes) -> bytes:
        """Return the message in a node's chat completion."""
        del node_id
        return msgspec.json.encode(message_of(body, self.expected))

    async def translation(self, node_id: str, count: CountTokens) -> MessageEvents:
        """Return what translates the stream.

        The first event tells the tokens of the prompt, which a chat stream tells last, so the node
        is asked to count them while it computes. Where it cannot, the last event is left to tell.
        """
        try:
            prompt_tokens = await count(self.count_body(node_id))
        except ApiError:
            prompt_tokens = 0
        return MessageEvents(self.expected, prompt_tokens)

    def count_body(self, node_id: str) -> bytes:
        """Return the request that counts the tokens of the prompt."""
        return count_body(self.chat, node_id)


def decode_messages(body: bytes, *, strip_billing_block: bool, counts_only: bool) -> MessagesCall:
    """Return the call in *body*; raise the ApiError that names what is wrong with it.

    With *counts_only* nothing will be generated, and ``max_tokens`` is not needed.
    """
    request = decode_request(body, counts_only=counts_only)
    try:
        return _call(request, strip_billing_block=strip_billing_block, counts_only=counts_only)
    except RecursionError as exc:  # writing goes a little deeper than reading has gone
        raise MalformedJson("the body is nested too deeply") from exc


def _call(
    request: MessagesRequest, *, strip_billing_block: bool, counts_only: bool
) -> MessagesCall:
    offer = offer_of(request)
    if offer.left_out:
        log.info("tools left out that nobody runs here", tools=offer.left_out)
    messages = chat_messages(request, strip_billing_block=strip_billing_block)
    if not messages:
        raise InvalidRequest("messages: nobody says anything", param="messages")
    chat = {
        **_continuation(request, messages, counts_only=counts_only),
        **tools_of(request, offer),
        **_reasoning(request),
        **_demanded(request),
        **_sampling(request),
    }
    thinking = request.thinking
    return MessagesCall(
        model=request.model,
        wants_stream=bool(request.stream),
        chat=encoded(chat),
        expected=Expected(
            request.model,
            request.max_tokens,
            omits_thinking=thinking is not None and thinking.is_omitted,
            diagnostics=request.diagnosed,
        ),
        affinity=_session(request, messages),
        output_limit=request.max_tokens,
    )


def _session(request: MessagesRequest, messages: list[Json]) -> str | None:
    metadata = {"user_id": request.metadata.user_id} if request.metadata else None
    return named_in_body(metadata=metadata) or head_of(messages)


def _continuation(request: MessagesRequest, messages: list[Json], *, counts_only: bool) -> Json:
    """Return the messages, and how the last one is continued where it is the assistant's."""
    place = f"messages.{len(request.messages) - 1}"
    last = messages[-1] if messages else {}
    if request.messages[-1].role != "assistant" or last.get("role") != "assistant":
        return {"messages": messages}
    if last == {"role": "assistant", "content": ""} and messages[1:]:  # nothing to go on from
        return {"messages": messages[:-1]}
    try:
        _refuse_endless(last, place)
    except ApiError:
        if not counts_only:
            raise
        return {"messages": messages, "add_generation_prompt": False}
    return {
        "messages": messages,
        "add_generation_prompt": False,
        "continue_final_message": True,
    }


def _refuse_endless(last: Json, place: str) -> None:
    """Raise ApiError where the last turn, of the assistant, cannot be continued."""
    if calls := last.get("tool_calls"):
        ids = ", ".join(call["id"] for call in calls)
        raise InvalidRequest(
            f"{place}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{ids}",
            param=place,
        )
    text = last["content"] if isinstance(last["content"], str) else last["content"][-1].get("text")
    if not text:
        raise UnsupportedParameter(
            f"{place}: the last turn is the assistant's and does not end in text: it cannot be "
            f"continued",
            param=place,
        )
    if text != text.rstrip():
        raise InvalidRequest(
            "messages: final assistant content cannot end with trailing whitespace", param=place
        )


def _reasoning(request: MessagesRequest) -> Json:
    said: Json = {}
    if thinking := request.thinking:
        said["thinking"] = {"type": thinking.type}
        if thinking.budget_tokens is not None:
            said["thinking"]["budget_tokens"] = thinking.budget_tokens
    if request.effort:
        said["reasoning_effort"] = request.effort
    return said


def _demanded(request: MessagesRequest) -> Json:
    """Return what the text of the answer must be, and what ends it."""
    said: Json = {}
    if form := request.format:
        schema = {"name": "answer", "schema": form.schema, "strict": True}
        said["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.stop_sequences:
        said["stop"] = request.stop_sequences
    return said


def _sampling(request: MessagesRequest) -> Json:
    given = {name: getattr(request, name) for name in SAMPLING}
    return {name: value for name, value in given.items() if value is not None}
