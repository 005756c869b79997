"""Completions over HTTP: answers, streams, refusals, faults, and clients that leave."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp.test_utils import TestClient
from blockbuster import blockbuster_ctx
from structlog.testing import capture_logs

from completion_calls import CHAT, HELLO, TEXT, asked, chat, events, streamed, text
from cortex.ipc.errors import NodeFailed
from cortex.ipc.node_api import EMBEDDED_MODEL, LoadRequest, SamplingDefaults
from cortex.ipc.ring import Flag
from cortex.runtime.config import AdmissionConfig, CacheConfig, NeuronConfig
from cortex.runtime.inference import Timing
from cortex.runtime.routes import SERVICES
from cortex.runtime.served_model import Limits
from fake_node import (
    FakeNode,
    found,
    posting,
    record,
    says,
    serving,
    tiny_text,
)
from fakes import until


@pytest.fixture(autouse=True)
def _nothing_blocks_the_loop() -> Iterator[None]:
    with blockbuster_ctx("cortex.runtime"):
        yield


async def frames_of(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """Yield the frames of a stream as they come."""
    async for line in response.content:
        if line.strip():
            yield line.decode().strip()


async def test_a_chat_completion_is_openais_object() -> None:
    status, body = await asked(FakeNode("m"), CHAT, chat())

    assert status == 200
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    choice = body["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Paris.",
        "refusal": None,
        "annotations": [],
    }
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)


async def test_usage_counts_the_prompt_and_every_generated_token() -> None:
    node = FakeNode("m")
    node.script = says("Paris.")

    _, body = await asked(node, CHAT, chat())

    prompt = len(node.asked[0][1])
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(node.script),
        "total_tokens": prompt + len(node.script),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_an_answer_cut_at_its_limit_says_length() -> None:
    node = FakeNode("m")
    node.script = says("Par", finish=Flag.LENGTH)

    _, body = await asked(node, CHAT, chat())

    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"] == "Par"


async def test_a_chat_stream_has_role_text_finish_and_done_in_that_order() -> None:
    frames = await streamed(FakeNode("m"), CHAT, chat())

    chunks = [chunk["choices"][0] for chunk in events(frames)]
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "Paris."
    assert [chunk["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1]["delta"], chunks[-1]["finish_reason"]) == ({}, "stop")
    assert frames[-1] == "data: [DONE]"


async def test_a_text_stream_concatenates_to_the_answer() -> None:
    frames = await streamed(FakeNode("m"), TEXT, text())

    chunks = events(frames)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Paris."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_echoes_the_request_id() -> None:
    headers = {"x-request-id": "r-1"}

    async with posting(FakeNode("m"), CHAT, chat(stream=True), headers) as response:
        assert response.headers["x-request-id"] == "r-1"


async def test_all_chunks_of_a_stream_share_one_id() -> None:
    frames = await streamed(FakeNode("m"), CHAT, chat())

    assert len({(chunk["id"], chunk["created"]) for chunk in events(frames)}) == 1


async def test_the_usage_chunk_comes_where_asked_for() -> None:
    body = chat(stream_options={"include_usage": True})

    chunks = events(await streamed(FakeNode("m"), CHAT, body))

    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(says("Paris."))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_without_being_asked_no_chunk_mentions_usage() -> None:
    chunks = events(await streamed(FakeNode("m"), CHAT, chat()))

    assert not any("usage" in chunk for chunk in chunks)


async def test_the_gateways_usage_comment_is_the_last_thing_before_done() -> None:
    frames = await streamed(FakeNode("m"), CHAT, chat(), **{"x-cortex-usage": "1"})

    name, _, usage = frames[-2].partition("usage ")
    assert (name, frames[-1]) == (": ", "data: [DONE]")
    assert msgspec.json.decode(usage)["completion_tokens"] == len(says("Paris."))


async def test_a_text_completion_takes_token_ids_as_they_are() -> None:
    node = FakeNode("m")

    _, body = await asked(node, TEXT, text(prompt=[5, 6, 7]))

    assert node.asked[0][1] == [5, 6, 7]
    assert body["choices"][0]["text"] == "Paris."


async def test_a_token_the_vocabulary_has_not_is_refused_before_a_stream_opens() -> None:
    node = FakeNode("m")

    status, body = await asked(node, TEXT, text(prompt=[5, 1 << 30], stream=True))

    assert (status, body["error"]["param"]) == (400, "prompt")
    assert node.asked == []


@pytest.mark.parametrize("prompt", ["", []])
async def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    status, body = await asked(FakeNode("m"), TEXT, text(prompt=prompt))

    assert (status, body["error"]["param"]) == (400, "prompt")


async def test_a_stop_string_ends_the_answer_before_it_and_the_generation() -> None:
    node = FakeNode("m")
    node.script = [*says("One. Two. Three.", finish=None), asyncio.Event()]

    _, body = await asked(node, CHAT, chat(stop=["Two", "nothing"]))

    assert body["choices"][0]["message"]["content"] == "One. "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] == "Two"
    assert node.generations[0].cancelled.is_set()


async def test_usage_ends_with_the_stop_string_however_the_tokens_arrive() -> None:
    one_by_one, at_once = FakeNode("m"), FakeNode("m")
    one_by_one.script = says("One. Two. Three.")
    at_once.script = [[token for batch in says("One. Two. Three.") for token in batch]]

    usages = [
        (await asked(node, CHAT, chat(stop="Two")))[1]["usage"] for node in (one_by_one, at_once)
    ]

    assert usages[0] == usages[1]


async def test_a_stop_string_is_never_half_sent() -> None:
    node = FakeNode("m")
    node.script = says("a quick brown fox")

    frames = await streamed(node, CHAT, chat(stop="brown"))

    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(frames)]
    assert "".join(deltas) == "a quick "
    assert events(frames)[-1]["choices"][0]["stop_reason"] == "brown"


async def test_seventeen_stop_strings_are_too_many() -> None:
    status, body = await asked(FakeNode("m"), CHAT, chat(stop=["x"] * 17))

    assert (status, body["error"]["param"]) == (400, "stop")


async def test_a_character_split_over_tokens_is_sent_whole() -> None:
    node = FakeNode("m")
    node.script = says("naïve 🦊")

    frames = await streamed(node, CHAT, chat())

    assert "�" not in "".join(frames)
    answer = "".join(c["choices"][0]["delta"].get("content", "") for c in events(frames))
    assert answer == "naïve 🦊"


async def test_sampling_is_asked_for_as_the_request_says() -> None:
    node = FakeNode("m")

    await asked(
        node,
        CHAT,
        chat(temperature=0.3, top_p=0.9, top_k=5, seed=7, max_tokens=9, max_completion_tokens=4),
    )

    _, _, sampling = node.asked[0]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.9, 5)
    assert (sampling.seed, sampling.max_tokens) == (7, 4)
    assert sampling.stop_token_ids == tiny_text().stop_token_ids


async def test_the_embedded_model_answers_greedily_unless_told_otherwise() -> None:
    node = FakeNode(EMBEDDED_MODEL)

    await asked(node, CHAT, chat(model=EMBEDDED_MODEL))

    assert node.asked[0][2].temperature == 0.0


async def test_the_operators_sampling_fills_what_the_request_leaves_out() -> None:
    node = FakeNode("m")
    node.models["m"].request = LoadRequest("m", sampling=SamplingDefaults(temperature=0.1, top_k=3))

    await asked(node, CHAT, chat(top_k=9))

    assert (node.asked[0][2].temperature, node.asked[0][2].top_k) == (0.1, 9)


async def test_ignore_eos_takes_the_stop_tokens_away() -> None:
    node = FakeNode("m")

    await asked(node, TEXT, text(ignore_eos=True))

    assert node.asked[0][2].stop_token_ids == ()


async def test_a_chat_may_fill_the_context_and_a_completion_gets_sixteen_tokens() -> None:
    node = FakeNode("m")

    await asked(node, CHAT, chat())
    await asked(node, TEXT, text())

    (_, prompt, sampling), (_, _, of_text) = node.asked
    assert sampling.max_tokens == 512 - len(prompt)
    assert of_text.max_tokens == 16


async def test_a_prompt_longer_than_the_context_is_refused_with_openais_words() -> None:
    status, body = await asked(FakeNode("m"), TEXT, text(prompt=[5] * 512))

    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 512 tokens" in body["error"]["message"]


async def test_a_prompt_that_no_memory_here_can_hold_is_413() -> None:
    node = FakeNode("m")
    node.models["m"].limits = Limits(512, 8, 64)

    status, body = await asked(node, TEXT, text(prompt=[5] * 100))

    assert (status, body["error"]["code"]) == (413, "prompt_too_long_for_memory")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (chat(tools=[{"type": "web_search"}]), "unsupported_parameter"),
        (chat(tools=[{"type": "function"}]), "invalid_request"),
        (chat(temperature=9), "invalid_request"),
        ({"messages": HELLO}, "missing_model_field"),
        (chat(messages=[]), "invalid_request"),
    ],
)
async def test_a_bad_request_is_400_with_its_code(body: dict[str, Any], code: str) -> None:
    status, answer = await asked(FakeNode("m"), CHAT, body | {"stream": True})

    assert (status, answer["error"]["code"]) == (400, code)


async def test_a_body_that_is_not_json_is_400() -> None:
    async with serving(FakeNode("m")) as client, client.post(CHAT, data=b"{") as response:
        assert (await response.json())["error"]["code"] == "malformed_json"


async def test_a_body_that_cannot_be_decompressed_is_400() -> None:
    headers = {"Content-Encoding": "gzip"}
    async with (
        serving(FakeNode("m")) as client,
        client.post(CHAT, data=b"no gzip", headers=headers) as response,
    ):
        body = await response.json()

    assert (response.status, body["error"]["code"]) == (400, "invalid_request")


async def test_a_model_that_is_not_loaded_is_404_and_names_the_way() -> None:
    status, body = await asked(FakeNode(), CHAT, chat(stream=True))

    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "/models/load" in body["error"]["message"]


@pytest.mark.parametrize(
    ("state", "code"), [("loading", "model_loading"), ("recovering", "recovering")]
)
async def test_a_model_on_its_way_is_503_with_retry_after(state: Any, code: str) -> None:
    node = FakeNode("m")
    node.models["m"].status = state

    async with posting(node, CHAT, chat()) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert (await response.json())["error"]["code"] == code


async def test_the_first_chunk_comes_before_anything_is_computed() -> None:
    node = FakeNode("m")
    prefilled = asyncio.Event()
    node.script = [prefilled, *says("Paris.")]

    async with posting(node, CHAT, chat(stream=True)) as response:
        frames = frames_of(response)
        first = await anext(frames)
        prefilled.set()
        rest = [frame async for frame in frames]

    assert '"role":"assistant"' in first
    assert rest[-1] == "data: [DONE]"


async def test_silence_is_broken_by_comments() -> None:
    node = FakeNode("m")
    prefilled = asyncio.Event()
    node.script = [prefilled, *says("Paris.")]

    timing = Timing(keep_alive_seconds=0.01)

    async with posting(node, CHAT, chat(stream=True), timing=timing) as response:
        frames = frames_of(response)
        await anext(frames)
        comments = [await anext(frames), await anext(frames)]
        prefilled.set()
        rest = [frame async for frame in frames]

    assert comments == [": keep-alive"] * 2
    assert rest[-1] == "data: [DONE]"


async def test_a_fault_in_mid_stream_is_an_error_frame_and_no_done() -> None:
    node = FakeNode("m")
    node.script = [*says("Par", finish=None), NodeFailed("the device process died")]

    frames = await streamed(node, CHAT, chat())

    last = msgspec.json.decode(frames[-1].removeprefix("data: "))
    assert last["error"]["code"] == "node_failed"
    assert "data: [DONE]" not in frames


async def test_a_fault_without_a_stream_is_a_status() -> None:
    node = FakeNode("m")
    node.script = [*says("Par", finish=None), NodeFailed("the device process died")]

    status, body = await asked(node, CHAT, chat())

    assert (status, body["error"]["code"]) == (502, "node_failed")


@pytest.mark.parametrize("script", [[], [[record(0, Flag.CANCELLED)]]])
async def test_tokens_that_just_stop_are_a_fault(script: list[Any]) -> None:
    node = FakeNode("m")
    node.script = script

    status, _ = await asked(node, CHAT, chat())

    assert status == 502


async def test_a_bug_in_mid_stream_does_not_leak_its_message() -> None:
    node = FakeNode("m")
    node.script = [*says("Par", finish=None), ZeroDivisionError("the secret")]

    with capture_logs() as lines:
        frames = await streamed(node, CHAT, chat())

    assert events(frames)[-1]["error"]["code"] == "internal_error"
    assert "the secret" not in "".join(frames)
    assert "stream failed" in [line["event"] for line in lines]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_during_prefill_ends_its_generation(stream: bool) -> None:
    node = FakeNode("m")
    node.script = [asyncio.Event(), *says("never")]

    with capture_logs() as lines:
        async with serving(node) as client:
            async with asyncio.TaskGroup() as tasks:
                request = tasks.create_task(posted(client, chat(stream=stream)))
                await node.started.wait()
                request.cancel()
            await until(node.generations[0].cancelled.is_set)
            await until(lambda: any(line["event"] == "request finished" for line in lines))

    finished = next(line for line in lines if line["event"] == "request finished")
    assert (finished["status"], finished["error"]) == (499, "client_gone")


async def posted(client: TestClient[Any, Any], body: dict[str, Any]) -> None:
    """Post and read to the end."""
    async with client.post(CHAT, json=body) as response:
        await response.read()


async def test_a_client_that_left_gives_its_seat_back() -> None:
    node = FakeNode("m")
    node.script = [asyncio.Event()]
    one_seat = NeuronConfig(
        admission=AdmissionConfig(max_in_flight=1, max_queue_depth=0),
        cache=CacheConfig("/nonexistent"),
    )

    async with serving(node, config=one_seat) as client:
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(posted(client, chat()))
            await node.started.wait()
            async with client.post(CHAT, json=chat()) as refused:
                assert refused.status == 503
                assert refused.headers["Retry-After"] == "1"
                assert (await refused.json())["error"]["code"] == "overloaded"
            request.cancel()
        await until(node.generations[0].cancelled.is_set)
        node.script = says("Paris.")
        async with client.post(CHAT, json=chat()) as response:
            assert response.status == 200


async def test_every_request_ends_in_one_canonical_line() -> None:
    node = FakeNode("m")

    with capture_logs() as lines:
        async with posting(node, CHAT, chat(), {"x-request-id": "r-1"}) as response:
            await response.read()

    finished = [line for line in lines if line["event"] == "request finished"]
    assert len(finished) == 1
    assert (
        finished[0].items()
        >= {
            "request_id": "r-1",
            "model": "m",
            "status": 200,
            "prompt_tokens": len(node.asked[0][1]),
            "completion_tokens": len(says("Paris.")),
            "finish_reason": "stop",
        }.items()
    )
    assert 0 <= finished[0]["first_token_seconds"] <= finished[0]["duration_seconds"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (chat(suffix="x"), {"status": 400, "error": "unsupported_parameter"}),
        (chat(model="other"), {"status": 404, "error": "model_not_found"}),
    ],
)
async def test_a_refused_request_has_its_line_too(
    body: dict[str, Any], fields: dict[str, Any]
) -> None:
    with capture_logs() as lines:
        await asked(FakeNode("m"), CHAT, body)

    finished = [line for line in lines if line["event"] == "request finished"]
    assert finished[0].items() >= fields.items()


async def test_a_neuron_that_drains_takes_nothing_new_and_finishes_what_runs() -> None:
    node = FakeNode("m")
    may_finish = asyncio.Event()
    node.script = [may_finish, *says("Paris.")]

    async with serving(node) as client:
        services = client.server.app[SERVICES]  # type: ignore[attr-defined] # BaseTestServer hides it
        async with client.post(CHAT, json=chat(stream=True)) as running:
            services.door.close()
            async with client.post(CHAT, json=chat()) as refused:
                assert (refused.status, refused.headers["Retry-After"]) == (503, "15")
                assert (await refused.json())["error"]["code"] == "shutting_down"
            may_finish.set()
            assert (await running.text()).endswith("data: [DONE]\n\n")
        await asyncio.wait_for(services.door.empty(), 5)


async def test_a_body_still_on_its_way_keeps_no_drain_waiting() -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        reached.set()  # the server has said 100 Continue, so its handler reads
        await may_go_on.wait()
        yield msgspec.json.encode(chat())

    async with serving(FakeNode("m")) as client, asyncio.TaskGroup() as tasks:
        posting = tasks.create_task(client.post(CHAT, data=body(), expect100=True))
        await reached.wait()
        door = client.server.app[SERVICES].door  # type: ignore[attr-defined] # as above
        door.close()
        async with asyncio.timeout(5):
            await door.empty()
        may_go_on.set()

    assert posting.result().status == 503


@pytest.mark.parametrize("body", [chat(), text()], ids=["chat", "text"])
@pytest.mark.parametrize("is_together", [True, False], ids=["one batch", "two"])
async def test_what_the_prefix_cache_had_is_told_and_is_no_token(
    body: dict[str, Any], is_together: bool
) -> None:
    path = CHAT if "messages" in body else TEXT
    usual, node = FakeNode("m"), FakeNode("m")
    first, *rest = says("Paris.")
    node.script = [[found(5), *first], *rest] if is_together else [[found(5)], first, *rest]

    with capture_logs() as lines:
        _, whole = await asked(node, path, body)
        frames = await streamed(
            node,
            path,
            body | {"stream_options": {"include_usage": True}},
            **{"x-cortex-usage": "1"},
        )
        _, without = await asked(usual, path, body)

    usage = without["usage"] | {"prompt_tokens_details": {"cached_tokens": 5}}
    assert whole["choices"] == without["choices"]
    assert whole["usage"] == usage
    assert events(frames)[-1]["usage"] == usage
    [comment] = [frame for frame in frames if frame.startswith(": usage ")]
    assert msgspec.json.decode(comment.removeprefix(": usage ")) == usage
    ends = [line["cached_tokens"] for line in lines if line["event"] == "request finished"]
    assert ends == [5, 5, 0]


async def test_of_several_choices_the_first_ones_cached_tokens_count() -> None:
    node = FakeNode("m")
    node.scripts = [[[found(n)], *says("Paris.")] for n in (2, 7)]

    _, whole = await asked(node, CHAT, chat(n=2))

    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2}])
async def test_the_time_to_the_first_token_does_not_end_with_the_prompt(
    more: dict[str, Any],
) -> None:
    node, gate = FakeNode("m"), asyncio.Event()
    node.script = [[found(5)], gate, *says("Paris.")]
    now = 0.0
    timing = Timing(clock=lambda: now)

    with capture_logs() as lines:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(asked(node, CHAT, chat(**more), timing=timing))
            await node.started.wait()
            await until(lambda: node.generations[0].is_waiting)
            now = 3.0
            gate.set()

    assert asking.result()[0] == 200
    [line] = [line for line in lines if line["event"] == "request finished"]
    assert line["first_token_seconds"] == 3.0


@pytest.mark.parametrize("body", [chat(), text()], ids=["chat", "text"])
async def test_the_tokens_of_a_step_are_one_chunk_with_the_same_text(body: dict[str, Any]) -> None:
    path = CHAT if "messages" in body else TEXT
    one_by_one, at_once = FakeNode("m"), FakeNode("m")
    batches = says('A naïve 🦊 "quoted" \\ text.')
    one_by_one.script, at_once.script = batches, [[r for batch in batches for r in batch]]

    singly = events(await streamed(one_by_one, path, body))
    together = events(await streamed(at_once, path, body))

    def said(chunks: list[Any]) -> list[str]:
        choices = [chunk["choices"][0] for chunk in chunks]
        texts = [c["text"] if "text" in c else c["delta"].get("content") for c in choices]
        return [piece for piece in texts if piece]

    assert said(together) == ["".join(said(singly))]
    assert together[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(said(singly)) > 1


# several prompts


@pytest.mark.parametrize("prompts", [["One", "Two more"], [[5, 6, 7], [8]]])
async def test_each_of_several_prompts_is_answered(prompts: list[Any]) -> None:
    node = FakeNode("m")
    node.scripts = [[[found(n)], *says(said)] for n, said in enumerate("abcd")]

    _, body = await asked(node, TEXT, text(prompt=prompts, n=2, seed=3, max_tokens=9))

    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate("abcd"))
    given = [prompt for _, prompt, _ in node.asked]
    assert given[0] == given[1] != given[2] == given[3]
    assert [sampling.seed for _, _, sampling in node.asked] == [3, 4, 3, 4]
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(given[0]) + len(given[2])
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0 + 2, "of the first to each"


async def test_several_prompts_stream_side_by_side() -> None:
    node = FakeNode("m")
    node.scripts = [says("Paris."), says("Rome.")]

    chunks = events(await streamed(node, TEXT, text(prompt=["One", "Two"])))

    said = {0: "", 1: ""}
    for chunk in chunks:
        said[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert said == {0: "Paris.", 1: "Rome."}


async def test_one_prompt_too_long_refuses_all() -> None:
    node = FakeNode("m")

    status, body = await asked(node, TEXT, text(prompt=["One", "x " * 600]))

    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert node.asked == []


async def test_an_empty_prompt_among_others_is_named() -> None:
    _, body = await asked(FakeNode("m"), TEXT, text(prompt=["One", ""]))

    assert body["error"]["param"] == "prompt[1]"


async def test_prompts_for_which_there_will_never_be_seats_are_refused() -> None:
    status, body = await asked(FakeNode("m"), TEXT, text(prompt=["One"] * 9))

    assert (status, body["error"]["seats"]) == (400, 8)


# how long an answer may be


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_of_no_tokens_the_answer_is_empty(path: str, is_stream: bool) -> None:
    node = FakeNode("m")
    node.script = [[found(16), record(0, Flag.LENGTH)]]
    body = (chat if path == CHAT else text)(max_tokens=0)

    if is_stream:
        options = {"stream_options": {"include_usage": True}}
        chunks = events(await streamed(node, path, body | options))
        choice, usage = chunks[-2]["choices"][0], chunks[-1]["usage"]
        assert not any(c["choices"][0].get("text") for c in chunks[:-1])
        assert not any(c["choices"][0].get("delta", {}).get("content") for c in chunks[:-1])
    else:
        _, answer = await asked(node, path, body)
        choice, usage = answer["choices"][0], answer["usage"]
        assert "" in (choice.get("text"), choice.get("message", {}).get("content"))

    assert (choice["finish_reason"], choice.get("stop_reason")) == ("length", None)
    assert usage["completion_tokens"] == 0
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
    assert node.asked[0][2].max_tokens == 0


@pytest.mark.parametrize("limit", [{}, {"max_tokens": 32_000}, {"max_completion_tokens": 32_000}])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_that_fills_the_context_says_so(
    limit: dict[str, int], is_stream: bool
) -> None:
    node = FakeNode("m")
    node.script = says("Par", finish=Flag.LENGTH)

    if is_stream:
        choice = events(await streamed(node, CHAT, chat(**limit)))[-1]["choices"][0]
    else:
        choice = (await asked(node, CHAT, chat(**limit)))[1]["choices"][0]

    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "context_length")
    _, prompt, sampling = node.asked[0]
    assert sampling.max_tokens == 512 - len(prompt), "all that there is room for"


async def test_an_answer_of_as_many_tokens_as_were_asked_for_does_not() -> None:
    node = FakeNode("m")
    node.script = says("Par", finish=Flag.LENGTH)
    room = 512 - len(await prompt_of(node))

    _, body = await asked(node, CHAT, chat(max_tokens=room))

    assert "stop_reason" not in body["choices"][0]


async def prompt_of(node: FakeNode) -> list[int]:
    """Return the tokens of the usual chat."""
    await asked(node, CHAT, chat())
    return node.asked.pop()[1]


# what cannot be read


@pytest.mark.parametrize("kind", ["image_url", "input_text", "input_image", "file", "input_audio"])
async def test_a_part_that_is_no_text_is_refused_by_its_name(kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {}}]

    status, body = await asked(
        FakeNode("m"), CHAT, chat(messages=[*HELLO, {"role": "user", "content": parts}])
    )

    assert (status, body["error"]["code"]) == (400, "unsupported_parameter")
    assert body["error"]["param"] == "messages[1].content[1].type"
    assert repr(kind) in body["error"]["message"]
