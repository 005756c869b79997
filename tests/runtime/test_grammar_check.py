"""Grammars are read by a child process that can be killed, and is, for time and for memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import llguidance
import pytest
from structlog.testing import capture_logs

from cortex.ipc.errors import InternalError, InvalidRequest, Overloaded, Recovering
from cortex.runtime.answer_grammar import of_text
from cortex.runtime.grammar_check import Bounds, GrammarCheck, Part
from cortex.runtime.grammar_reader import KEPT, Question, Reader
from cortex.runtime.structured import Demand
from tiny_grammar import ByteVocabulary

HERE = Path(__file__).resolve().parent
BYTES = ByteVocabulary("<|end|>")
GOOD = 'start: "a"'
BAD = "start: /[/"
ENDLESS = 'start: %json {"type": "integer", "multipleOf": 99999989}'
COUNTING = """
import sys
log = open(sys.argv[1], "a", buffering=1)
print("ready", flush=True)
for line in sys.stdin:
    log.write(line)
    print('""', flush=True)
"""
"""A child that finds nothing, and notes what it was asked."""


def part(lark: str, place: str = "here") -> Part:
    return Part(of_text(Demand(lark, place)), place)


@pytest.fixture
async def check() -> AsyncIterator[GrammarCheck]:
    made = GrammarCheck()
    yield made
    await made.close()


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_grammars_are_read_by_one_child(check: GrammarCheck) -> None:
    assert check.pid is None
    await check.refuse_bad([part(GOOD)], BYTES)
    first = check.pid
    with pytest.raises(InvalidRequest, match=r"^here: .*unclosed") as refusal:
        await check.refuse_bad([part('start: "b"'), part(BAD)], BYTES)

    assert refusal.value.param == "here"
    assert first is not None
    assert check.pid == first
    await check.close()
    assert not is_there(first)


async def test_no_parts_need_no_child(check: GrammarCheck) -> None:
    await check.refuse_bad([], BYTES)

    assert check.pid is None


async def test_what_is_no_lark_is_told_what_lark_is(check: GrammarCheck) -> None:
    with pytest.raises(InvalidRequest, match=r"read as Lark"):
        await check.refuse_bad([part("root ::= [0-9]", "structured_outputs.grammar")], BYTES)


async def test_a_grammar_that_takes_too_long_costs_its_child_and_is_refused_by_its_place() -> None:
    check = GrammarCheck(Bounds(seconds=0.2))
    with pytest.raises(InvalidRequest, match=r"here: it takes more than 0.2 s") as refusal:
        await check.refuse_bad([part(ENDLESS)], BYTES)

    assert refusal.value.param == "here"
    assert check.pid is None
    with pytest.raises(InvalidRequest, match=r"0.2 s"):
        await check.refuse_bad([part(ENDLESS)], BYTES)
    assert check.pid is None, "the verdict is known"


async def test_a_child_that_is_killed_for_its_time_is_one_line_of_the_log() -> None:
    with capture_logs() as lines, pytest.raises(InvalidRequest):
        await GrammarCheck(Bounds(seconds=0.2)).refuse_bad([part(ENDLESS)], BYTES)

    assert [line["event"] for line in lines] == ["grammar reader killed"]


async def test_a_child_that_dies_over_a_grammar_is_one_line_of_the_log(
    endless: tuple[GrammarCheck, asyncio.Future[None], int],
) -> None:
    _, asking, pid = endless
    os.kill(pid, signal.SIGABRT)
    with capture_logs() as lines, pytest.raises(InvalidRequest):
        await asking

    (line,) = lines
    assert (line["event"], line["exit_code"]) == ("grammar reader lost", -signal.SIGABRT)


async def test_a_new_child_reads_what_comes_after_one_that_was_killed() -> None:
    check = GrammarCheck(Bounds(seconds=1.0))
    bad, good = await asyncio.gather(
        check.refuse_bad([part(ENDLESS)], BYTES),
        check.refuse_bad([part(GOOD)], BYTES),
        return_exceptions=True,
    )

    assert isinstance(bad, InvalidRequest)
    assert good is None
    await check.close()


async def test_a_grammar_that_takes_too_much_memory_is_refused() -> None:
    check = GrammarCheck(Bounds(seconds=60.0, memory_bytes=160 << 20))
    with pytest.raises(InvalidRequest, match="it takes more than 160 MiB of memory to compile"):
        await check.refuse_bad([part(ENDLESS)], BYTES)
    await check.refuse_bad([part(GOOD)], BYTES)
    await check.close()


@pytest.mark.parametrize(
    ("lark", "words"),
    [
        (f"start: /{llguidance.regex_to_lark('(a{1000}){1000}', '')}/", "too many expressions"),
        (
            "start: %json "
            + json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
            "max is 2000",
        ),
    ],
)
async def test_what_would_fail_at_the_first_tokens_is_found_before(lark: str, words: str) -> None:
    found = Reader().answer(Question(part(lark).grammar, BYTES.control_tokens))

    assert words in found
    assert "non-verbose" not in found


async def test_a_verdict_is_known_as_long_as_it_is_among_the_last(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    check = GrammarCheck(kept=2, command=(sys.executable, "-c", COUNTING, str(log)))
    for letter in "abacba":
        await check.refuse_bad([Part(letter, "here")], BYTES)
    await asyncio.gather(*(check.refuse_bad([Part("d", "here")], BYTES) for _ in range(3)))
    await check.close()

    assert [json.loads(line)["grammar"] for line in log.read_text().splitlines()] == [*"abcbad"]


async def test_more_than_may_wait_are_turned_away() -> None:
    check = GrammarCheck(Bounds(waiting=1))
    first, second = await asyncio.gather(
        check.refuse_bad([part(GOOD)], BYTES),
        check.refuse_bad([part('start: "b"')], BYTES),
        return_exceptions=True,
    )
    await check.close()

    assert first is None
    assert isinstance(second, Overloaded)
    assert second.retry_after_seconds


@pytest.fixture
async def endless() -> AsyncIterator[tuple[GrammarCheck, asyncio.Future[None], int]]:
    """Yield a check that is reading a grammar without an end, and its child."""
    check = GrammarCheck(Bounds(seconds=60.0))
    await check.refuse_bad([part(GOOD)], BYTES)
    pid = check.pid
    assert pid is not None
    asking = asyncio.ensure_future(check.refuse_bad([part(ENDLESS)], BYTES))
    await asyncio.sleep(0)  # until it has asked
    yield check, asking, pid
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await check.close()


async def test_a_client_that_leaves_takes_the_work_on_its_grammar_along(
    endless: tuple[GrammarCheck, asyncio.Future[None], int],
) -> None:
    check, asking, pid = endless
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    assert asking.cancelled()
    assert not is_there(pid)
    await check.refuse_bad([part('start: "b"')], BYTES)


async def test_a_child_that_somebody_else_kills_says_nothing_of_the_grammar(
    endless: tuple[GrammarCheck, asyncio.Future[None], int],
) -> None:
    check, asking, pid = endless
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Recovering):
        await asking

    await check.refuse_bad([part('start: "b"')], BYTES)


async def test_a_child_that_breaks_over_a_grammar_refuses_it(
    endless: tuple[GrammarCheck, asyncio.Future[None], int],
) -> None:
    _, asking, pid = endless
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(InvalidRequest, match="could not be compiled"):
        await asking


@pytest.mark.parametrize("program", ["", "input()"])
async def test_a_child_that_does_not_start_is_no_fault_of_the_grammar(program: str) -> None:
    bounds = Bounds(start_seconds=0.1 if program else 30.0)
    check = GrammarCheck(bounds, command=(sys.executable, "-c", program))
    with pytest.raises(InternalError, match="does not start"):
        await check.refuse_bad([part(GOOD)], BYTES)

    assert check.pid is None


NEURON = """
import asyncio, sys
sys.path[:0] = sys.argv[1:]
from test_grammar_check import BYTES, ENDLESS, GOOD, Bounds, GrammarCheck, part

async def main():
    check = GrammarCheck(Bounds(seconds=600.0))
    await check.refuse_bad([part(GOOD)], BYTES)
    asking = asyncio.create_task(check.refuse_bad([part(ENDLESS)], BYTES))
    await asyncio.sleep(0)
    print(check.pid, flush=True)
    await asking

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_a_stop_ends_the_process_and_its_child_whatever_is_being_read(
    how: signal.Signals,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", NEURON, str(HERE), str(HERE.parent)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    child = int(await process.stdout.readline())
    watched = os.pidfd_open(child)
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(watched, gone.set)
    process.send_signal(how)
    async with asyncio.timeout(20):
        await process.wait()
        await gone.wait()
    loop.remove_reader(watched)
    os.close(watched)


def test_a_reader_keeps_the_last_vocabularies() -> None:
    reader = Reader()
    for i in range(KEPT + 1):
        assert reader.answer(Question(part(GOOD).grammar, {300 + i: b"<c>"})) == ""

    assert len(reader._vocabularies) == KEPT


@pytest.mark.parametrize("name", ["PanicException", "SystemExit"])
def test_only_a_panic_over_a_grammar_is_an_answer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panics(grammar: str, vocabulary: object) -> str:
        raise type(name, (BaseException,), {})

    monkeypatch.setattr("cortex.runtime.grammar_reader.fault_of", panics)
    question = Question(part(GOOD).grammar, {})
    if name == "PanicException":
        assert "could not be compiled" in Reader().answer(question)
    else:
        with pytest.raises(BaseException) as raised:  # noqa: PT011
            Reader().answer(question)
        assert type(raised.value).__name__ == name
