"""How many tokens a prompt has, asked of whatever node serves it.

    node                 asked                                        answers
    a neuron             POST /tokenize {model, messages, tools, ...} {"count": n}
    vLLM                 the same                                     {"count": n, ...}
    llama-server         POST /apply-template {messages, tools, ...}  {"prompt": "..."}
                         POST /tokenize {content: prompt}             {"tokens": [...]}
    llama-cpp-python's   POST /extras/tokenize/count {model, input}   {"count": n}

The last one counts text and knows no templates: what is said is counted, and the tools as JSON, so
the prompt has a few tokens more than that. Nothing tells what an engine is, so it is asked in this
order until it answers; others, Ollama say, cannot tell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import orjson

from cortex.gateway.fleet import Node
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import ApiError, ModelNotFound, NodeFailed

Json = dict[str, Any]
Ask = Callable[[str, Json], Awaitable[Json]]
"""POST an object to a path; return the object that is answered, empty where it is refused."""


async def count_tokens_at(
    client: NodeClient, node: Node, body: bytes, headers: Mapping[str, str]
) -> int:
    """Return the tokens of the prompt in *body*, a chat request without sampling.

    Raise ApiError; where the node does not have the model, or cannot tell, that is a 404.
    """
    if node.is_engine:
        return await _at_engine(client, node, body)
    async with client.ask(node, "/tokenize", body, headers) as asked:  # a long prompt takes a while
        answer = await asked.read()
    try:
        return int(orjson.loads(answer)["count"])
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError) as exc:
        raise NodeFailed(f"node {node.name} did not answer with a count") from exc


async def _at_engine(client: NodeClient, node: Node, body: bytes) -> int:
    async def ask(path: str, asked: Json) -> Json:
        try:
            answer = await client.control(node, f"POST {path}", orjson.dumps(asked))
            return dict(orjson.loads(answer))
        except ApiError as error:
            if error.status >= 500:
                raise
        except (orjson.JSONDecodeError, TypeError, ValueError):
            pass
        return {}

    chat = orjson.loads(body)
    for way in WAYS:
        count = await way(ask, chat)
        if isinstance(count, int):
            return count
    raise ModelNotFound(f"node {node.name} cannot count tokens", param="model")


async def _as_vllm(ask: Ask, chat: Json) -> Any:
    return (await ask("/tokenize", chat)).get("count")


async def _as_llama_server(ask: Ask, chat: Json) -> Any:
    prompt = (await ask("/apply-template", chat)).get("prompt")
    if not isinstance(prompt, str):
        return None
    tokens = (await ask("/tokenize", {"content": prompt, "add_special": True})).get("tokens")
    return len(tokens) if isinstance(tokens, list) else None


async def _as_llama_cpp_python(ask: Ask, chat: Json) -> Any:
    text = "\n".join(_text(chat))
    return (await ask("/extras/tokenize/count", {"model": chat["model"], "input": text})).get(
        "count"
    )


WAYS = (_as_vllm, _as_llama_server, _as_llama_cpp_python)


def _text(chat: Json) -> Iterator[str]:
    """Yield what a prompt is made of, without what its template adds."""
    for message in chat["messages"]:
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if isinstance(part.get("text"), str))
        if calls := message.get("tool_calls"):
            yield orjson.dumps(calls).decode()
    if tools := chat.get("tools"):
        yield orjson.dumps(tools).decode()
