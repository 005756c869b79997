"""Sequences with grammars: alone and in company, while others run, and how they end."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator

import pytest

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Cancel, Failed, ModelLoaded, ReasoningBudget, SamplingParams
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.answer_grammar import of_text
from cortex.runtime.device.grammar import Grammars
from cortex.runtime.device.vocabulary import Vocabulary
from cortex.runtime.structured import Demand
from engine_fakes import VOCABULARY, DeviceBench, FakeLoad, FakeModel, answer
from engine_run import Run

# Tokens 0 to 94 are the printable characters of ASCII, 95 is a line break, 96 no text.
TEXTS = [bytes([32 + i]) for i in range(95)] + [b"\n", b"<|end|>"]
END = 96
PROMPT = [1, 2, 3]
WORD = "start: /[a-z]{4,9}/"
NUMBERS = 'start: NUMBER ("," NUMBER)*\nNUMBER: /[0-9]{1,3}/'


def vocabulary() -> Vocabulary:
    return Vocabulary(list(TEXTS), frozenset({END}))


def ids(text: str) -> list[int]:
    return [TEXTS.index(c.encode()) for c in text]


def text(tokens: list[int]) -> str:
    return b"".join(TEXTS[token] for token in tokens).decode()


def keeping_to(lark: str, *, seed: int | None = None, **more: object) -> SamplingParams:
    options = {"max_tokens": 40, "stop_token_ids": (END,), **more}
    return SamplingParams(
        temperature=0.0 if seed is None else 1.5,
        seed=seed or 0,
        grammar=of_text(Demand(lark, "here")),
        **options,  # type: ignore[arg-type] # what a test changes
    )


RunOf = Callable[..., Run]


@pytest.fixture
def run_of() -> Iterator[RunOf]:
    """Make runs whose engines are closed at the end."""
    made: list[Run] = []

    def run(**options: object) -> Run:
        read = options.pop("read", vocabulary)
        grammars = Grammars(read, VOCABULARY)  # type: ignore[arg-type] # a test's reading
        made.append(Run(grammars=grammars, **options))  # type: ignore[arg-type]
        return made[-1]

    yield run
    for it in made:
        it.engine.close()


def until_idle(run: Run, *sequence_ids: int) -> None:
    """Run until each of the sequences has ended."""
    for _ in range(2000):
        if all(number in run.finishes or number in run.codes for number in sequence_ids):
            return
        if not run.engine.has_work:
            assert select.select(run.engine.fds, [], [], 20.0)[0], "nothing will come"
        run.engine.take_compiled()
        run.step()
    raise AssertionError("it never came to an end")


def said_alone(
    run_of: RunOf, prompt: list[int], sampling: SamplingParams, **options: object
) -> str:
    run = run_of(**options)
    run.start(1, prompt, sampling)
    until_idle(run, 1)
    assert run.has_all_blocks
    return text(run.tokens[1])


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_an_answer_keeps_to_its_grammar(run_of: RunOf, seed: int | None) -> None:
    run = run_of()
    run.start(1, PROMPT, keeping_to(WORD, seed=seed))
    until_idle(run, 1)

    word = text(run.tokens[1]).removesuffix("<|end|>")
    assert word.isalpha()
    assert 4 <= len(word) <= 9
    assert run.finishes[1] == Flag.STOP


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("speculation", [False, True])
def test_an_answer_is_the_same_alone_in_company_and_after_preemption(
    run_of: RunOf, runs_ahead: bool, speculation: bool
) -> None:
    asked = {
        number: ([number, 7, number], keeping_to(lark, seed=seed))
        for number, (lark, seed) in enumerate(
            [(WORD, 5), (NUMBERS, None), (NUMBERS, 6), (WORD, None), (NUMBERS, 8)], 1
        )
    }
    options = EngineOptions(speculation=speculation)
    alone = {number: said_alone(run_of, *ask) for number, ask in asked.items()}

    run = run_of(blocks=5, seats=5, budget=4, runs_ahead=runs_ahead, options=options)
    for number, (prompt, sampling) in asked.items():
        run.start(number, prompt, sampling)
    run.start(9, [9, 9])
    until_idle(run, *asked, 9)

    assert {number: text(run.tokens[number]) for number in asked} == alone
    assert run.tokens[9] == answer([9, 9], 8)
    assert run.has_all_blocks


def test_drafts_are_kept_where_the_grammar_repeats_itself(run_of: RunOf) -> None:
    lark = "start: /(abcdef,){8}/"
    plain = run_of(options=EngineOptions(speculation=False))
    drafting = run_of()
    for run in (plain, drafting):
        run.start(1, PROMPT, keeping_to(lark, max_tokens=60))
        until_idle(run, 1)

    assert drafting.tokens == plain.tokens
    assert drafting.accepted > 10
    assert drafting.steps < plain.steps


def test_an_answer_ends_where_nothing_can_follow_without_a_token_for_it(run_of: RunOf) -> None:
    run = run_of()
    run.start(1, PROMPT, keeping_to('start: "yes" | "no"'))
    until_idle(run, 1)

    assert text(run.tokens[1]) in {"yes", "no"}
    assert run.finishes[1] == Flag.STOP


def test_an_answer_that_is_complete_with_its_last_token_was_not_cut(run_of: RunOf) -> None:
    run = run_of()
    run.start(1, PROMPT, keeping_to('start: "yes"', max_tokens=3))
    run.start(2, PROMPT, keeping_to('start: "yes"', max_tokens=2))
    until_idle(run, 1, 2)

    assert (text(run.tokens[1]), run.finishes[1]) == ("yes", Flag.STOP)
    assert (text(run.tokens[2]), run.finishes[2]) == ("ye", Flag.LENGTH)


def test_without_ends_an_answer_goes_on_until_it_is_complete(run_of: RunOf) -> None:
    run = run_of()
    run.start(1, PROMPT, keeping_to("start: /a{1,12}/", stop_token_ids=()))
    until_idle(run, 1)

    assert (text(run.tokens[1]), run.finishes[1]) == ("a" * 12, Flag.STOP)


def test_reasoning_is_ended_by_its_budget_and_the_grammar_goes_on_behind_it(run_of: RunOf) -> None:
    lark = 'start: "(" block "yes"\nblock[lazy]: /(?s:.)*/ ")"'
    budget = ReasoningBudget(5, tuple(ids("(")), tuple(ids(")")))
    run = run_of()
    run.start(1, PROMPT, keeping_to(lark, reasoning_budget=budget))
    until_idle(run, 1)

    said = text(run.tokens[1])
    assert (said[0], said[6:]) == ("(", ")yes")
    assert run.finishes[1] == Flag.STOP


def test_a_token_that_has_to_come_waits_until_the_grammar_allows_it(run_of: RunOf) -> None:
    """As where the budget strikes within a character of several tokens."""
    lark = 'start: "(" /[a-z]{8}/ ")" "yes"'
    budget = ReasoningBudget(3, tuple(ids("(")), tuple(ids(")")))
    run = run_of()
    run.start(1, PROMPT, keeping_to(lark, reasoning_budget=budget))
    until_idle(run, 1)

    assert text(run.tokens[1])[9:] == ")yes"


def test_a_grammar_that_cannot_be_compiled_fails_its_sequence_alone(run_of: RunOf) -> None:
    run = run_of()
    run.start(1, PROMPT, keeping_to("start: /[/"))
    run.start(2, PROMPT)
    until_idle(run, 1, 2)

    assert run.codes == {1: "grammar_failed"}
    assert "unclosed" in run.failures[0].detail
    assert run.tokens[2] == answer(PROMPT, 8)
    assert run.has_all_blocks


def test_an_answer_that_no_token_can_go_on_with_fails_alone(run_of: RunOf) -> None:
    run = run_of()
    run.start(1, PROMPT, keeping_to('start: "ab" /é/'))
    run.start(2, PROMPT)
    until_idle(run, 1, 2)

    assert text(run.tokens[1]) == "ab"
    assert run.codes == {1: "grammar_failed"}
    assert run.tokens[2] == answer(PROMPT, 8)
    assert run.has_all_blocks


class SlowVocabulary:
    """A vocabulary that is read when the test says so."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.may_finish = threading.Event()

    def __call__(self) -> Vocabulary:
        self.started.set()
        assert self.may_finish.wait(20.0), "the test never let it finish"
        return vocabulary()


def test_a_slow_grammar_holds_nobody_else_up(run_of: RunOf) -> None:
    slow = SlowVocabulary()
    run = run_of(read=slow)
    run.start(1, PROMPT, keeping_to(WORD))
    assert slow.started.wait(20.0)
    run.start(2, [4, 5])
    run.until_idle()

    assert run.tokens[2] == answer([4, 5], 8)
    assert run.tokens[1] == []
    assert 1 in run.engine
    assert run.engine.standing().waiting == 1
    slow.may_finish.set()
    until_idle(run, 1)
    assert run.finishes[1] == Flag.STOP


@pytest.mark.parametrize("everybody", [False, True])
def test_a_sequence_can_be_cancelled_while_its_grammar_is_compiled(
    run_of: RunOf, everybody: bool
) -> None:
    slow = SlowVocabulary()
    run = run_of(read=slow)
    run.start(1, PROMPT, keeping_to(WORD))

    words = run.engine.cancel_all() if everybody else run.engine.cancel(1)

    [word] = words
    assert isinstance(word, TokenRecord)
    assert (word.sequence_id, word.flags) == (1, Flag.CANCELLED)
    assert 1 not in run.engine
    slow.may_finish.set()
    run.start(2, PROMPT, keeping_to('start: "yes"'))
    until_idle(run, 2)
    assert text(run.tokens[2]) == "yes"
    assert run.tokens[1] == []


# In the device's loop


@pytest.fixture
def bench() -> Iterator[DeviceBench]:
    made = DeviceBench(FakeLoad(m=FakeModel()))
    yield made
    made.close()


def test_the_loop_sleeps_until_a_grammar_is_compiled_and_tells_what_became_of_it(
    bench: DeviceBench,
) -> None:
    assert isinstance(bench.load("m"), ModelLoaded)

    bench.generate(1, PROMPT, keeping_to(WORD))  # the fake model has no files
    bench.run_until_ended(1)

    [failed] = [event for event in bench.channel.events if isinstance(event, Failed)]
    assert (failed.sequence_id, failed.code) == (1, "grammar_failed")
    assert "tokenizer" in failed.detail or "/m" in failed.detail


def test_a_sequence_whose_grammar_is_compiled_is_cancelled_like_any_other(
    bench: DeviceBench,
) -> None:
    bench.load("m")

    bench.generate(1, PROMPT, keeping_to(WORD))
    bench.send(Cancel(bench.command_id(), 1))
    bench.run_until_ended(1)

    assert bench.finish(1) == Flag.CANCELLED
