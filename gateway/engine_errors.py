"""What engines refuse with, in our words; pure.

An engine has no error codes of ours, and says what is wrong in one of these shapes:

    {"error": {"message", "type", "param", "code"}}    OpenAI, vLLM, llama-server; the code may be a
                                                       number, the status once more
    {"object": "error", "message", ...}                older vLLM, SGLang
    {"error": "..."}                                   Ollama
    {"detail": "..."}, {"detail": [{"loc", "msg"}]}    FastAPI
    text                                               taken as the message
    HTML                                               no words for a client

    status, or words                                   here
    401, 403                                           502 node_failed: it is our key that is wrong
    the prompt, or its answer, exceeds the context     400 context_length_exceeded, with the numbers
    404 and a model, or a code that says so            404 model_not_found
    404, 405                                           404 not_found: it has no such path
    429, 503                                           503 overloaded, or model_loading
    another 4xx                                        the same, invalid_request
    408, 504                                           504 node_timeout
    5xx                                                502 node_failed
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from cortex.gateway.engine_choices import objects_in
from cortex.gateway.errors import Relayed, seconds_in
from cortex.ipc.errors import ApiError, NodeFailed

Json = dict[str, Any]

TOO_LONG = "context_length_exceeded"
LONGEST_WORDS = 1000
LIMIT = r"context length (is|of) (only )?(?P<limit>\d+)"
OVERFLOWS = (
    LIMIT + r".*\((?P<prompt>\d+) in (the messages|your prompt)[,;] (?P<answer>\d+) (in|for) the",
    LIMIT + r".* your request has (?P<prompt>\d+) input tokens \((?P<answer>\d+) >",
    LIMIT + r".*: (?P<prompt>\d+) tokens from the input.* (?P<answer>\d+) tokens for the compl",
    LIMIT + r".*(requested|has|contains|resulted in) (?P<prompt>\d+) (input )?tokens",
    r"passed (?P<prompt>\d+) input tokens and requested (?P<answer>\d+) output tokens.*" + LIMIT,
    r"\((?P<prompt>\d+) tokens\) is longer than the model's context length \((?P<limit>\d+)",
    r"prompt \(length (?P<prompt>\d+)\) is longer than the maximum model length of (?P<limit>\d+)",
    r"request \((?P<prompt>\d+) tokens\) exceeds the available context size \((?P<limit>\d+)",
    r"tokens \((?P<prompt>\d+)\) exceed context window of (?P<limit>\d+)",
)
"""How vLLM, SGLang and llama.cpp say that a prompt, or the answer to it, does not fit."""
CODES = {
    404: "not_found",
    405: "not_found",
    408: "node_timeout",
    429: "overloaded",
    503: "overloaded",
    504: "node_timeout",
}
STATUS = {
    TOO_LONG: 400,
    "model_not_found": 404,
    "not_found": 404,
    "node_failed": 502,
    "overloaded": 503,
    "model_loading": 503,
    "node_timeout": 504,
}
STATES = {
    "node_failed": "failed",
    "overloaded": "has no room now",
    "model_loading": "is not ready",
    "node_timeout": "did not answer in time",
}
"""What is the engine's fault is said of it; what is the client's, in its words alone."""
PARAMS = {TOO_LONG: "messages", "model_not_found": "model"}
NOT_NOW = frozenset({"overloaded", "model_loading"})
NUMBERS = {"n_prompt_tokens": "prompt_tokens", "n_ctx": "maximum_tokens"}
"""What llama-server says beside the words."""


def refusal(
    node: str, status: int, body: bytes, *, path: str = "", retry_after: str | None = None
) -> ApiError:
    """Return what it means that the engine *node* has answered *status*, 400 or above."""
    if status in (401, 403):
        return NodeFailed(f"node {node} wants another key: set key_file of this engine")
    return _meaning(node, status, told_in(body), path=path, retry_after=retry_after)


def failure(node: str, error: Json) -> ApiError:
    """Return what the *error* object means that stands in an answer of status 200."""
    status = error.get("code")
    if not isinstance(status, int) or not 400 <= status < 600:
        status = 500
    return _meaning(node, status, error)


def error_in(data: Json) -> Json | None:
    """Return the error object of an answer, or None where it is no error."""
    error = data.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str) and error:
        return {"message": error}
    return data if data.get("object") == "error" else None


def told_in(body: bytes) -> Json:
    """Return the error object that *body* comes to; empty where it has no words for a client."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body.decode(errors="replace").strip()
        return {} if text.startswith("<") else {"message": text}
    if not isinstance(data, dict):
        return {}
    if error := error_in(data):
        return error
    return _of_fastapi(data["detail"]) if "detail" in data else data


def _of_fastapi(detail: Any) -> Json:
    if isinstance(detail, str):
        return {"message": detail}
    if isinstance(detail, dict):
        return detail
    said, places = [], []
    for wrong in objects_in(detail):
        place = ".".join(map(str, wrong["loc"][1:])) if isinstance(wrong.get("loc"), list) else ""
        places.append(place)
        said.append(f"{place}: {wrong.get('msg')}" if place else str(wrong.get("msg")))
    return {"message": "; ".join(said), "param": next(filter(None, places), None)}


def _meaning(
    node: str, status: int, told: Json, *, path: str = "", retry_after: str | None = None
) -> Relayed:
    words, param = _words(told), told.get("param")
    numbers = _numbers(words, told)
    code = _code(status, words, told, has_numbers=bool(numbers))
    return Relayed(
        STATUS.get(code, status),
        code,
        _message(node, code, words, path),
        param=PARAMS.get(code, param if isinstance(param, str) else None),
        retry_after_seconds=(seconds_in(retry_after) or 1) if code in NOT_NOW else None,
        extras=numbers if code == TOO_LONG else {},
    )


def _code(status: int, words: str, told: Json, *, has_numbers: bool) -> str:
    own = told.get("code")
    if status < 500 and (has_numbers or own == TOO_LONG or "available context size" in words):
        return TOO_LONG
    if own == "model_not_found" or (status == 404 and "model" in words.lower()):
        return "model_not_found"
    if status == 503 and "loading" in words.lower():
        return "model_loading"
    return CODES.get(status, "invalid_request" if status < 500 else "node_failed")


def _message(node: str, code: str, words: str, path: str) -> str:
    if code == "not_found":
        return f"node {node} does not serve {path or 'this path'}"
    if code in STATES:
        return f"node {node} {STATES[code]}{f': {words}' if words else ''}"
    return words or f"node {node} refused this and gave no reason"


def _words(told: Json) -> str:
    """Return the message, in one line; a traceback is for nobody but the engine's operator."""
    said = told.get("message")
    if not isinstance(said, str) or "Traceback (most recent call last)" in said:
        return ""
    return " ".join(said.split())[:LONGEST_WORDS]


def _numbers(words: str, told: Json) -> Json:
    """Return how many tokens there are and may be, as a neuron says it; empty if it is not said."""
    said = {ours: told[name] for name, ours in NUMBERS.items() if isinstance(told.get(name), int)}
    if len(said) == len(NUMBERS):
        return said
    found = next(filter(None, (re.search(pattern, words) for pattern in OVERFLOWS)), None)
    if found is None:
        return {}
    numbers = {name: int(value) for name, value in found.groupdict().items()}
    answer = {"answer_tokens": numbers["answer"]} if "answer" in numbers else {}
    return {"prompt_tokens": numbers["prompt"], "maximum_tokens": numbers["limit"], **answer}
