"""One request, one line in the log of each end, both with its id."""

from typing import Any

import msgspec
import urllib3

from stack import MODEL, Stack, until


def lines_of(stack: Stack, request_id: str) -> list[dict[str, Any]]:
    said = [line for line in stack.log.read_text().splitlines() if line.startswith("{")]
    told = [msgspec.json.decode(line) for line in said]
    return [
        line
        for line in told
        if line.get("event") == "request finished" and line.get("request_id") == request_id
    ]


def test_gateway_and_neuron_tell_the_same_of_one_request(stack: Stack) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}

    answer = urllib3.request(
        "POST",
        f"{stack.url}/v1/chat/completions",
        body=msgspec.json.encode(body),
        headers={"Content-Type": "application/json", "x-request-id": "one-and-the-same"},
    )

    usage = answer.json()["usage"]
    until(lambda: len(lines_of(stack, "one-and-the-same")) == 2, "a line of each end")
    lines = {line["role"]: line for line in lines_of(stack, "one-and-the-same")}
    assert set(lines) == {"gateway", "neuron"}
    for line in lines.values():
        assert (line["model"], line["status"]) == (MODEL, 200)
        assert line["prompt_tokens"] == usage["prompt_tokens"]
        assert line["completion_tokens"] == usage["completion_tokens"]
        assert line["finish_reason"] == answer.json()["choices"][0]["finish_reason"]
    assert lines["gateway"]["duration_seconds"] >= lines["neuron"]["duration_seconds"]
