"""Between a supervisor and a life of a device process everything that is opened is closed, once."""

import asyncio
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.ipc.errors import (
    ContextLengthExceeded,
    GrammarFailed,
    InvalidRequest,
    ModelNotFound,
    NodeFailed,
    Overloaded,
    PeerGone,
)
from cortex.ipc.messages import (
    Cancel,
    Command,
    Embed,
    Embedded,
    EngineReport,
    Failed,
    Generate,
    LoadProgress,
    ModelUnloaded,
    Ping,
    Pong,
    SamplingParams,
)
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.device_conversation import Conversation, Refused, api_error
from cortex.runtime.generation import Generation
from supervisor_fakes import hello, records

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=1)


class Talk:
    """A conversation and what went out."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.conversation = Conversation(self.sent.append, itertools.count(1))

    def generate(self, model_id: str = "m") -> Generation:
        return self.conversation.generate(model_id, [1, 2], GREEDY)


async def how_it_ended(generation: Generation) -> str:
    """Return the flag of the finish, or the code of the error."""
    try:
        batches = [batch async for batch in generation]
    except NodeFailed as exc:
        return exc.code
    return Flag(batches[-1][-1].flags & Flag.FINISH).name or ""


@pytest.fixture
def talk() -> Talk:
    return Talk()


async def test_a_question_returns_its_answer(talk: Talk) -> None:
    asyncio.get_running_loop().call_soon(lambda: talk.conversation.hear(Pong(1)))

    assert await talk.conversation.ask(Ping) == Pong(1)
    assert talk.sent == [Ping(1)]


async def test_an_answer_to_another_question_is_not_taken(talk: Talk) -> None:
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: talk.conversation.hear(Pong(2)))
    loop.call_soon(lambda: talk.conversation.hear(Pong(1)))

    assert await talk.conversation.ask(Ping) == Pong(1)


async def test_a_refusal_is_raised_with_what_was_said(talk: Talk) -> None:
    failed = Failed("already_loaded", "it is there", command_id=1)
    asyncio.get_running_loop().call_soon(lambda: talk.conversation.hear(failed))

    with pytest.raises(Refused, match="already_loaded: it is there") as refused:
        await talk.conversation.ask(Ping)
    assert refused.value.failed is failed


async def test_an_answer_after_a_refusal_is_too_late(talk: Talk) -> None:
    def answer_twice() -> None:
        talk.conversation.hear(Failed("no", "no", command_id=1))
        talk.conversation.hear(Pong(1))
        talk.conversation.hear(Failed("no", "no", command_id=1))

    asyncio.get_running_loop().call_soon(answer_twice)

    with pytest.raises(Refused):
        await talk.conversation.ask(Ping)


async def test_the_last_report_of_a_model_is_known_until_it_is_unloaded(talk: Talk) -> None:
    reports = [EngineReport(model, 1, 0, free, 0, 0, 0) for model, free in [("a", 5), ("b", 6)]]
    newer = EngineReport("a", 0, 0, 9, 0, 0, 0)
    for report in (*reports, newer):
        talk.conversation.hear(report)
    assert talk.conversation.reports == {"a": newer, "b": reports[1]}

    talk.conversation.hear(ModelUnloaded(1, "a"))

    assert talk.conversation.reports == {"b": reports[1]}


async def test_a_generation_says_how_urgent_it_is(talk: Talk) -> None:
    talk.conversation.generate("m", [1], GREEDY, priority=3)

    assert talk.sent == [Generate(1, 1, "m", [1], GREEDY, priority=3)]


async def test_progress_reaches_the_one_who_asked(talk: Talk) -> None:
    seen: list[tuple[int, int]] = []
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: talk.conversation.hear(LoadProgress(1, "m", 5, 10)))
    loop.call_soon(lambda: talk.conversation.hear(LoadProgress(2, "other", 6, 10)))
    loop.call_soon(lambda: talk.conversation.hear(Pong(1)))

    await talk.conversation.ask(Ping, progress=lambda done, total: seen.append((done, total)))

    assert seen == [(5, 10)]


async def test_the_end_of_the_life_ends_an_open_question(talk: Talk) -> None:
    asyncio.get_running_loop().call_soon(lambda: talk.conversation.end(NodeFailed("killed")))

    with pytest.raises(PeerGone, match="killed"):
        await talk.conversation.ask(Ping)


async def test_a_question_after_the_end_is_refused(talk: Talk) -> None:
    talk.conversation.end(NodeFailed("killed"))

    with pytest.raises(PeerGone, match="killed"):
        await talk.conversation.ask(Ping)


async def test_a_generation_after_the_end_has_failed_already(talk: Talk) -> None:
    talk.conversation.end(NodeFailed("killed"))

    with pytest.raises(NodeFailed, match="killed"):
        await anext(talk.generate())


async def test_cancelling_after_the_end_sends_nothing(talk: Talk) -> None:
    generation = talk.generate()
    talk.conversation.end(NodeFailed("killed"))
    generation.cancel()

    assert [type(command) for command in talk.sent] == [Generate]


async def test_records_go_to_the_sequence_they_name(talk: Talk) -> None:
    one, other = talk.generate(), talk.generate()
    mixed = [*records(2, [8]), *records(1, [5]), *records(2, [9], Flag.STOP)]
    talk.conversation.receive(mixed)

    assert await anext(one) == records(1, [5])
    assert await anext(other) == [mixed[0], mixed[2]]


async def test_a_finished_generation_is_forgotten(talk: Talk) -> None:
    generation = talk.generate()
    talk.conversation.receive(records(1, [5], Flag.STOP))
    talk.conversation.receive(records(1, [6], Flag.STOP))

    assert talk.conversation.generations == {}
    assert await anext(generation) == records(1, [5], Flag.STOP)


async def test_a_generation_is_cancelled_by_its_number(talk: Talk) -> None:
    talk.generate().cancel()

    assert talk.sent[-1] == Cancel(2, 1)


async def test_a_failure_that_names_the_sequence_ends_it(talk: Talk) -> None:
    generation = talk.generate()
    talk.conversation.hear(Failed("unhealthy_logits", "a NaN", sequence_id=1))

    with pytest.raises(NodeFailed, match="a NaN"):
        await anext(generation)


async def test_a_refusal_that_names_only_the_command_ends_it_too(talk: Talk) -> None:
    generation = talk.generate()
    talk.conversation.hear(Failed("duplicate_sequence", "in use", command_id=1))

    with pytest.raises(NodeFailed, match="in use"):
        await anext(generation)


async def test_an_embedding_gets_its_vector_and_is_forgotten(talk: Talk) -> None:
    vector = talk.conversation.embed("m", [1, 2], "mean")
    talk.conversation.hear(Embedded(1, b"1234"))
    talk.conversation.hear(Embedded(1, b"5678"))

    assert await vector.wait() == b"1234"
    assert talk.sent == [Embed(1, "m", [1, 2], "mean")]
    assert talk.conversation.running == []


async def test_a_failure_that_names_the_command_ends_its_embedding(talk: Talk) -> None:
    vector = talk.conversation.embed("m", [], "mean")
    talk.conversation.hear(Failed("empty_prompt", "no tokens", command_id=1))

    with pytest.raises(InvalidRequest, match="no tokens"):
        await vector.wait()
    assert talk.conversation.running == []


async def test_an_embedding_is_cancelled_by_its_number_and_open_until_that_is_answered(
    talk: Talk,
) -> None:
    vector = talk.conversation.embed("m", [1], "mean")
    vector.cancel()

    assert talk.sent[-1] == Cancel(2, 1)
    assert talk.conversation.is_open
    talk.conversation.hear(Failed("cancelled", "cancelled", command_id=1))
    assert not talk.conversation.is_open


async def test_the_end_of_the_life_ends_an_open_embedding(talk: Talk) -> None:
    vector = talk.conversation.embed("m", [1], "mean")
    talk.conversation.end(NodeFailed("killed"))

    with pytest.raises(NodeFailed, match="killed"):
        await vector.wait()


async def test_an_embedding_after_the_end_has_failed_already(talk: Talk) -> None:
    talk.conversation.end(NodeFailed("killed"))

    with pytest.raises(NodeFailed, match="killed"):
        await talk.conversation.embed("m", [1], "mean").wait()
    assert talk.sent == []


async def test_the_embeddings_of_a_model_are_failed_with_it(talk: Talk) -> None:
    one, other = (talk.conversation.embed(model, [1], "last") for model in ("m", "n"))
    talk.conversation.fail_model("m", ModelNotFound("unloaded"))

    with pytest.raises(ModelNotFound):
        await one.wait()
    assert talk.conversation.running == [other]


async def test_only_the_generations_of_the_model_are_failed(talk: Talk) -> None:
    one, other = talk.generate("one"), talk.generate("other")
    talk.conversation.fail_model("one", ModelNotFound("unloaded"))

    assert one.ended.is_set()
    assert talk.conversation.of_model("one") == []
    assert talk.conversation.of_model("other") == [other]


async def test_what_concerns_the_whole_process_is_left_to_its_owner(talk: Talk) -> None:
    generation = talk.generate()
    talk.conversation.hear(hello())
    talk.conversation.hear(Failed("device_lost", "broken", fatal=True))

    assert not generation.ended.is_set()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("context_length_exceeded", ContextLengthExceeded),
        ("token_out_of_range", InvalidRequest),
        ("grammar_failed", GrammarFailed),
        ("out_of_memory", Overloaded),
        ("model_not_loaded", ModelNotFound),
        ("unhealthy_logits", NodeFailed),
        ("unloadable", NodeFailed),
    ],
)
def test_a_code_of_the_device_becomes_an_http_error(code: str, error: type[Exception]) -> None:
    assert type(api_error(Failed(code, "why"))) is error


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from(["token", "stop", "failed", "cancel", "end"])),
        max_size=30,
    )
)
def test_whatever_happens_every_generation_has_exactly_one_end(what: list[tuple[int, str]]) -> None:
    async def play() -> None:
        talk = Talk()
        generations = {number: talk.generate() for number in (1, 2, 3)}
        for number, happening in what:
            match happening:
                case "token":
                    talk.conversation.receive(records(number, [1]))
                case "stop":
                    talk.conversation.receive(records(number, [1], Flag.STOP))
                case "failed":
                    talk.conversation.hear(Failed("step_failed", "x", sequence_id=number))
                case "cancel":
                    generations[number].cancel()
                case _:
                    talk.conversation.end(NodeFailed("killed"))
        finish = TokenRecord(0, 0, math.nan, Flag.CANCELLED)
        talk.conversation.receive([finish._replace(sequence_id=n) for n in generations])
        ends = [await asyncio.wait_for(how_it_ended(g), 5) for g in generations.values()]
        assert set(ends) <= {"STOP", "CANCELLED", "node_failed"}
        assert talk.conversation.generations == {}

    asyncio.run(play())
