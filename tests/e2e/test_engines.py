"""A real engine behind a real gateway: llama-cpp-python's server with the embedded model.

It is compiled when it is installed, for a quarter of an hour, so it is not among what tests need;
without it all of this is skipped. Into an environment of its own, named by LLAMA_CPP_PYTHON:

    python -m venv /tmp/llama
    /tmp/llama/bin/pip install -c packaging/constraints.txt 'llama-cpp-python[server]'
    LLAMA_CPP_PYTHON=/tmp/llama/bin/python scripts/test tests/e2e/test_engines.py
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import urllib3

from stack import free_port, until

HERE = [sys.executable] if find_spec("llama_cpp") and find_spec("fastapi") else []
PYTHON = [*filter(None, [os.environ.get("LLAMA_CPP_PYTHON")]), *HERE]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="LLAMA_CPP_PYTHON names no server to test against"),
]

MODEL = "smollm2-at-an-engine"
CONTEXT_TOKENS = 512
HTTP = urllib3.PoolManager(retries=False, timeout=60.0)
TURNS: Any = [{"role": "user", "content": "Name the capital of France."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the process ended"
    try:
        return HTTP.request("GET", url).status == 200
    except urllib3.exceptions.HTTPError:
        return False


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[str]:
    """The base URL of the engine."""
    port = free_port()
    options = {
        "model": embedded_model,
        "model_alias": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "n_ctx": CONTEXT_TOKENS,
        "n_threads": 2,
        "verbose": False,
    }
    written = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [PYTHON[0], "-m", "llama_cpp.server", *written]
    log = tmp_path_factory.mktemp("engine") / "log"
    with running(command, log) as process:
        until(lambda: answers(f"http://127.0.0.1:{port}/v1/models", process), "the engine")
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def gateway(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a gateway that has this engine, and no neuron."""
    folder = tmp_path_factory.mktemp("gateway")
    port, metrics_port = free_port(), free_port()
    config = folder / "cortex.toml"
    config.write_text(
        f"""
[gateway]
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics_port}"
[[engines]]
name = "llama"
endpoint = "{engine}"
max_in_flight = 1
[state]
directory = "{folder}/state"
[timeouts]
poll_seconds = 0.1
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "cortex.gateway", "serve", "--config", str(config)]
    url = f"http://127.0.0.1:{port}"
    with running(command, folder / "log") as process:
        until(lambda: answers(f"{url}/v1/models/{MODEL}", process), "the gateway")
        yield url


@pytest.fixture
def chat(gateway: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(gateway: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway, api_key="none", max_retries=0) as client:
        yield client


def test_its_model_is_listed_as_loaded(gateway: str) -> None:
    entry = HTTP.request("GET", f"{gateway}/v1/models/{MODEL}").json()

    assert (entry["loaded"], entry["locations"]) == (True, [{"node": "llama", "status": "loaded"}])


def test_a_chat_is_answered_and_metered(chat: openai.OpenAI) -> None:
    answer = chat.chat.completions.create(model=MODEL, messages=TURNS, max_tokens=8, temperature=0)

    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8


def test_a_stream_says_the_same_to_its_end(chat: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": TURNS, "max_tokens": 40, "temperature": 0}

    whole = chat.chat.completions.create(**asked)
    chunks = list(chat.chat.completions.create(**asked, stream=True))

    said = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(said) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_tool_that_is_demanded_is_called_in_the_anthropic_dialect(
    claude: anthropic.Anthropic,
) -> None:
    asked: Any = {
        "model": MODEL,
        "max_tokens": 60,
        "messages": TURNS,
        "tools": [{"name": "answer", "description": "Answers.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "answer"},
    }

    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()

    for message in (whole, streamed):
        [block] = [block.to_dict() for block in message.content]
        assert (block["type"], block["name"]) == ("tool_use", "answer")
        assert block["input"] in ({"city": "Paris"}, {"city": "Rome"})
        assert message.stop_reason == "tool_use"


def test_a_response_is_answered(chat: openai.OpenAI) -> None:
    response = chat.responses.create(model=MODEL, input="Say hi.", max_output_tokens=8)

    assert response.output_text


def test_a_response_streams(chat: openai.OpenAI) -> None:
    asked = chat.responses.create(model=MODEL, input="Say hi.", max_output_tokens=8, stream=True)

    last = list(asked)[-1]

    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text


def test_tokens_are_counted(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=TURNS)

    assert 5 <= counted.input_tokens <= 12


def test_a_prompt_that_is_too_long_is_said_in_the_known_words(claude: anthropic.Anthropic) -> None:
    long: Any = [{"role": "user", "content": "word " * CONTEXT_TOKENS}]

    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 512"):
        claude.messages.create(model=MODEL, max_tokens=4, messages=long)


def test_what_it_cannot_do_is_refused_in_words(chat: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        chat.embeddings.create(model=MODEL, input="hi")

    assert refused.value.code == "node_failed"
    assert "embedding" in refused.value.message


def test_a_model_that_it_does_not_have_is_not_found(chat: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat.chat.completions.create(model="absent", messages=TURNS)


def test_an_engine_that_answers_is_full_and_free_again_when_its_client_leaves(
    chat: openai.OpenAI,
) -> None:
    asked: Any = {"model": MODEL, "messages": TURNS, "max_tokens": 400}
    stream = chat.chat.completions.create(**asked, stream=True)
    next(iter(stream))

    with pytest.raises(openai.InternalServerError) as refused:
        chat.chat.completions.create(**asked)
    stream.close()

    assert refused.value.code == "overloaded"
    until(lambda: _is_answered(chat), "the engine to be free")


def _is_answered(chat: openai.OpenAI) -> bool:
    try:
        chat.chat.completions.create(model=MODEL, messages=TURNS, max_tokens=1)
    except openai.InternalServerError:
        return False
    return True
