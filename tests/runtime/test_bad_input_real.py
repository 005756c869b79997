"""Bad input at a real neuron: no process dies, no request hangs, no block of the memory is lost."""

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from schemathesis import GenerationMode

from api_cases import CONFORMS, REFUSES, name_of, operations, tried
from at_rest import asked
from bad_http import bad_http
from raw_http import head, post, wire
from real_neuron import RealNeuron
from tiny_checkpoint import CONTEXT_TOKENS, write_checkpoint

EXAMPLES = int(os.environ.get("CORTEX_API_EXAMPLES", "10"))
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LABELS = [name_of(forms) for forms in operations("x") if forms[0].body]
DISTURBING = {"POST /models/unload", "POST /devices/{index}/restart"}
"""Operations that do what they are asked, to the model that the other tests need."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNeuron]:
    with RealNeuron(tmp_path_factory.mktemp("neuron")) as neuron:
        yield neuron


@pytest.fixture
def neuron(served: RealNeuron) -> Iterator[RealNeuron]:
    """A neuron that is looked at afterwards."""
    yield served
    served.check_at_rest()


async def test_what_is_not_http_harms_nothing(neuron: RealNeuron) -> None:
    for bad in bad_http(CHAT):
        async with wire(neuron.port) as connection:
            answer = await asked(connection, bad.sent)

        assert (bad.name, answer.refusal) == (bad.name, bad.refusal)


@pytest.mark.parametrize("label", [label for label in LABELS if label not in DISTURBING])
@pytest.mark.parametrize("mode", GenerationMode)
def test_whatever_is_asked_is_answered_as_the_document_says(
    neuron: RealNeuron, label: str, mode: GenerationMode
) -> None:
    [forms] = [forms for forms in operations(neuron.model) if name_of(forms) == label]
    is_positive = mode is GenerationMode.POSITIVE
    checks = CONFORMS if is_positive else [*CONFORMS, *REFUSES]

    tried(forms if is_positive else forms[:2], mode, neuron.url, checks, EXAMPLES)


@pytest.mark.parametrize("after", [0, 20, 60, 90])
async def test_clients_that_leave_anywhere_leave_nothing(neuron: RealNeuron, after: int) -> None:
    prompt = b",".join([b"7"] * (CONTEXT_TOKENS - 100))
    body = b'{"model": "%s", "stream": true, "max_tokens": 90, "ignore_eos": true, "prompt": [%s]}'
    sent = post(COMPLETIONS, body % (neuron.model.encode(), prompt))

    for part in range(8):
        async with wire(neuron.port) as connection:
            await connection.send(sent[: len(sent) * (part + 1) // 8])
            if part == 7:
                await connection.lines(after)


def test_a_prompt_over_the_context_says_both_numbers(neuron: RealNeuron) -> None:
    asked_for = {"model": neuron.model, "prompt": [7] * (CONTEXT_TOKENS + 1)}

    status, answer = neuron.post(COMPLETIONS, asked_for)

    error = answer["error"]
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert (error["prompt_tokens"], error["maximum_tokens"]) == (CONTEXT_TOKENS + 1, CONTEXT_TOKENS)


def test_loads_of_one_model_at_once_are_one(neuron: RealNeuron, tmp_path: Path) -> None:
    body = {"model_id": f"file:{write_checkpoint(tmp_path / 'other')}", "wait": True}

    answers = at_once(12, lambda: neuron.post("/models/load", body))

    assert answers == [(200, {"status": "loaded"})] * 12
    assert neuron.log().count(f'"model":"{body["model_id"]}"') >= 1
    assert neuron.post("/models/unload", {"model_id": body["model_id"]})[0] == 200


@pytest.mark.parametrize(
    "template", ["{% for", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% include 'x' %}"]
)
def test_a_model_with_a_broken_template_is_not_loaded(
    neuron: RealNeuron, tmp_path: Path, template: str
) -> None:
    body = {"model_id": f"file:{write_checkpoint(tmp_path / 'broken', template)}", "wait": True}

    answers = at_once(4, lambda: neuron.post("/models/load", body))

    for status, answer in answers:
        assert (status, answer["error"]["code"]) == (422, "unloadable")
        assert answer["error"]["kind"] == "chat_template_unsupported"
        assert "template" in answer["error"]["message"]


IDS = [
    "/etc/passwd",
    "/",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/" + "x" * 4000,
    "/\0",
    "..",
]


@pytest.mark.parametrize("path", IDS, ids=[repr(path[:20]) for path in IDS])
def test_a_path_that_is_no_model_is_not_loaded(neuron: RealNeuron, path: str) -> None:
    status, answer = neuron.post("/models/load", {"model_id": f"file:{path}", "wait": True})

    assert (status, answer["error"]["code"]) == (422, "unloadable")
    assert answer["error"]["kind"]


@pytest.mark.parametrize(
    "model_id", ["../x", "a/b/c", "a/..", "pypi:../x.gguf", "pypi:a/../../x.gguf"]
)
def test_an_id_that_leads_nowhere_is_not_loaded(neuron: RealNeuron, model_id: str) -> None:
    status, answer = neuron.post("/models/load", {"model_id": model_id, "wait": True})

    assert (status, answer["error"]["code"]) == (422, "unloadable")


async def test_health_is_quick_while_large_bodies_are_read(neuron: RealNeuron) -> None:
    large = post(COMPLETIONS, b'{"model": "m", "prompt": [%s0]}' % (b"0," * 2**19))

    async with (
        wire(neuron.port) as one,
        wire(neuron.port) as other,
        asyncio.TaskGroup() as tasks,
    ):
        refused = tasks.create_task(asked(one, large))
        while not refused.done():
            assert (await asked(other, head("GET", "/health"))).status == 200

    assert refused.result().refusal == (404, "model_not_found")


def at_once(times: int, ask: Any) -> list[Any]:
    """Return what *times* callers get who ask together."""
    barrier = threading.Barrier(times)

    def one(_: int) -> Any:
        barrier.wait(30)
        return ask()

    with ThreadPoolExecutor(times) as threads:
        return list(threads.map(one, range(times)))
