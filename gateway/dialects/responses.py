"""OpenAI's Responses, as the node's chat request; answers are in ``response_objects.py``.

    instructions                        the first turn, of the system; those of an earlier response
                                        do not carry over
    previous_response_id                the conversation up to there, from the store
    input                               the turns after it (``response_items.py``)
    tools, tool_choice                  chat's (``response_tools.py``)
    text.format, reasoning.effort       response_format, reasoning_effort
    max_output_tokens                   max_completion_tokens

What may stand in a request, and what is refused, is in ``response_request.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from cortex.gateway.affinity import head_of, named_in_body
from cortex.gateway.dialects.chat_request import (
    ChatFields,
    chat_body,
    check_depth,
    count_body,
    encoded,
    refusal_of,
)
from cortex.gateway.dialects.dialect import CountTokens
from cortex.gateway.dialects.openai import OPENAI, OpenAI
from cortex.gateway.dialects.response_events import Numbered, ResponseEvents
from cortex.gateway.dialects.response_items import TAKERS, Item, messages_of, type_of
from cortex.gateway.dialects.response_objects import Outline, response_of
from cortex.gateway.dialects.response_request import (
    ResponsesRequest,
    decode_request,
    options_of,
    repeated,
)
from cortex.gateway.dialects.response_tools import choose, offer_of
from cortex.ipc.errors import ApiError, BodyTooLarge, InvalidRequest, MalformedJson
from cortex.ipc.node_api import MAX_BODY_BYTES

CLIENTS_WORDS = {
    "image_url": "input_image",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
}
"""For those of a chat request."""


class Memory(Protocol):
    """The stored responses of whoever asks."""

    def conversation(self, last: str) -> list[Item]:
        """Return the items up to the response *last*; raise PreviousResponseNotFound."""

    def item(self, item_id: str, place: str) -> Item:
        """Return a stored item; raise InvalidRequest, with its *place*, where there is none."""

    def keep(self, response: dict[str, Any], items: msgspec.Raw) -> None:
        """Store *response*, and the *items* that came in with its request."""


@dataclass(frozen=True)
class ResponsesCall:
    """A call whose answer is translated, and stored where *memory* is there."""

    model: str
    wants_stream: bool
    chat: ChatFields
    """The chat request, but for the model."""
    outline: Outline
    items: msgspec.Raw
    """What came in, as it is stored."""
    affinity: str | None
    memory: Memory | None
    numbered: Numbered
    output_limit: int | None = None
    path: str = "/v1/chat/completions"
    dialect: OpenAI = field(default=OPENAI)
    stay_seconds: float | None = None
    is_translated: bool = True

    def keep_alive(self, text: str) -> bytes:
        """Return that the response is queued, or a comment that says *text*."""
        return self.numbered.keep_alive("queued", text)

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return ``response.failed``."""
        del request_id  # it is in the header
        return self.numbered.fail(error)

    def refusal(self, error: ApiError) -> ApiError:
        """Return *error* in the client's words."""
        return refusal_of(error, CLIENTS_WORDS)

    def body(self, node_id: str) -> bytes:
        """Return the chat request."""
        return chat_body(self.chat, node_id, wants_stream=self.wants_stream)

    def count_body(self, node_id: str) -> bytes:
        """Return the request that counts the tokens of the prompt."""
        return count_body(self.chat, node_id)

    def answer(self, node_id: str, body: bytes) -> bytes:
        """Return the response in a node's chat completion."""
        del node_id
        response = response_of(body, self.outline)
        self._keep(response)
        return msgspec.json.encode(response)

    async def translation(self, node_id: str, count: CountTokens) -> ResponseEvents:
        """Return what translates the stream, going on from the events there have been."""
        del node_id, count
        return ResponseEvents(self.numbered, self._keep)

    def _keep(self, response: dict[str, Any]) -> None:
        if self.memory is not None:
            self.memory.keep(response, self.items)


def decode_responses(body: bytes, memory: Memory, *, stores: bool) -> ResponsesCall:
    """Return the call in *body*; raise the ApiError that names what is wrong with it.

    *stores*: whether a response may be put into *memory*.
    """
    request = decode_request(body)
    try:
        return _call(request, memory, stores=stores)
    except RecursionError as exc:  # writing goes a little deeper than reading has gone
        raise MalformedJson("the body is nested too deeply") from exc


def _call(request: ResponsesRequest, memory: Memory, *, stores: bool) -> ResponsesCall:
    offer, choice = choose(offer_of(request.tools or []), request.tool_choice)
    is_stored = stores and request.store is not False
    asked = repeated(request, offer, is_stored=is_stored)
    check_depth(asked)
    outline = Outline(request.model, asked, offer, request.wants_summary)
    placed = list(_items(request, memory))
    messages = _messages(request, memory, placed)
    kept = placed if is_stored else []
    items = [_listed(item, outline, index) for index, (_, item) in enumerate(kept)]
    return ResponsesCall(
        model=request.model,
        wants_stream=bool(request.stream),
        chat=_encoded({"messages": messages, **options_of(request, offer, choice)}),
        outline=outline,
        items=msgspec.Raw(msgspec.json.encode(items)),
        affinity=named_in_body(request.prompt_cache_key, request.metadata) or head_of(messages),
        memory=memory if is_stored else None,
        numbered=Numbered(outline),
        output_limit=request.max_output_tokens,
    )


def _encoded(chat: dict[str, Any]) -> ChatFields:
    fields = encoded(chat)
    if len(memoryview(fields["messages"])) > MAX_BODY_BYTES:  # what is stored may be any number
        raise BodyTooLarge(f"the conversation is larger than {MAX_BODY_BYTES // 2**20} MiB")
    return fields


def _messages(
    request: ResponsesRequest, memory: Memory, placed: list[tuple[str, Item]]
) -> list[dict[str, Any]]:
    earlier: list[Item] = []
    if request.previous_response_id is not None:
        earlier = memory.conversation(request.previous_response_id)
    messages = messages_of([*(("previous_response_id", item) for item in earlier), *placed])
    if not messages:
        raise InvalidRequest("input: a text, or at least one item, is needed", param="input")
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    return messages


def _items(request: ResponsesRequest, memory: Memory) -> Iterator[tuple[str, Item]]:
    """Yield the items of the request that are for the model, and their places."""
    said = request.input
    if isinstance(said, str):
        said = [{"type": "message", "role": "user", "content": said}]
    referred: set[str] = set()
    for index, item in enumerate(said or []):
        place, kind = f"input[{index}]", type_of(item or {})
        if item is not None and kind == "item_reference":
            name = str(item.get("id"))
            if name in referred:  # a small body must not become a prompt of any size
                raise InvalidRequest(f"{place}: {name!r} is there twice", param=f"{place}.id")
            referred.add(name)
            yield place, memory.item(name, place)
        elif item is not None and kind in TAKERS:
            yield place, item


def _listed(item: Item, outline: Outline, index: int) -> Item:
    """Return *item* as it can be stored and listed: with a type, an id, and parts."""
    kind = type_of(item)
    own = item.get("id")
    if not isinstance(own, str) or not own:
        own = outline.item_id("msg" if kind == "message" else "in", f"i{index}")
    listed = {**item, "id": own, "type": kind}
    if kind == "message" and not isinstance(listed.get("content"), list):
        text = {"type": "input_text", "text": listed.get("content") or ""}
        if listed["role"] == "assistant":
            text |= {"type": "output_text", "annotations": []}
        listed["content"] = [text]
    return listed
