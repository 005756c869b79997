"""Masks against brute force, the end of an answer, drafts, and grammars that cannot be compiled."""

from __future__ import annotations

import json
import random
import re
import select
import threading
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import llguidance
import pytest
from tokenizers import AddedToken
from torch import Tensor

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.runtime.answer_grammar import of_text
from cortex.runtime.device.grammar import KEPT, Grammars, GrammarState
from cortex.runtime.device.vocabulary import Vocabulary, without_vocabulary
from cortex.runtime.structured import Demand
from cortex.runtime.tokenizer import Tokenizer
from tiny_grammar import ByteVocabulary
from tiny_text import SPECIALS, metadata_of, trained, write_gguf

WORDS = ("ab", "abc", "é", "ba", "aa", '{"', '":', "0", "bab")
TINY = ByteVocabulary("<|end|>", "<|call|>", "<|eot|>", words=WORDS)
END, CALL, TURN = TINY.control.values()
SIZE = TINY.vocab_size + 40
"""Logits have more rows than the tokenizer has tokens."""


def vocabulary() -> Vocabulary:
    return Vocabulary(list(TINY.texts), TINY.control_ids)


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    made = Grammars(vocabulary, SIZE)
    yield made
    made.close()


def asked(
    grammars: Grammars, *larks: str, ends: Sequence[int] = (END,)
) -> list[GrammarState | str]:
    """Return what comes of the grammars, in order."""
    for number, lark in enumerate(larks):
        grammars.ask(number, of_text(Demand(lark, "here")), ends)
    found: dict[int, GrammarState | str] = {}
    while len(found) < len(larks):
        assert select.select(grammars.fds, [], [], 20.0)[0], "nothing comes"
        found.update(grammars.take())
    return [found[number] for number in range(len(larks))]


def state_of(grammars: Grammars, lark: str, ends: Sequence[int] = (END,)) -> GrammarState:
    [state] = asked(grammars, lark, ends=ends)
    assert isinstance(state, GrammarState), state
    return state


def ids(mask: Tensor) -> set[int]:
    """Return the tokens that *mask* allows."""
    words = [int(word) & 0xFFFFFFFF for word in mask.tolist()]
    assert len(words) == -(-SIZE // 32)
    return {i for i in range(32 * len(words)) if words[i // 32] >> i % 32 & 1}


def masks(grammars: Grammars, state: GrammarState, *drafts: int) -> list[set[int]]:
    [found] = grammars.masks([(state, drafts)]).result(20.0)
    return [ids(mask) for mask in found]


def allowed(grammars: Grammars, state: GrammarState) -> set[int]:
    [found] = masks(grammars, state)
    return found


SHORT = ["".join(letters) for count in range(4) for letters in product("ab", repeat=count)]
COMPACT = '"x-guidance": {"whitespace_flexible": false}'
FINITE = {
    "start: /[ab]{0,3}c?/": [*SHORT, *(text + "c" for text in SHORT)],
    'start: "ab" | "abc" | "a" | "aé" | "é"': ["ab", "abc", "a", "aé", "é"],
    'start: ("a" | "ba") "b"? "a"': ["aa", "aba", "baa", "baba"],
    f'start: %json {{"enum": ["a", 0, null, {{"": 0}}], {COMPACT}}}': [
        '"a"',
        "0",
        "null",
        '{"":0}',
    ],
}


@pytest.mark.parametrize("lark", FINITE)
def test_a_mask_is_exactly_what_goes_on_to_a_text_of_the_language(
    grammars: Grammars, lark: str
) -> None:
    language = {text.encode() for text in FINITE[lark]}
    chance = random.Random(7)
    for _ in range(12):
        state, said = state_of(grammars, lark, ends=(END, TURN)), b""
        while True:
            goes_on = {
                i
                for i, text in enumerate(TINY.texts)
                if text and any(word.startswith(said + text) for word in language)
            }
            ends = {END, TURN} if said in language else set()
            assert allowed(grammars, state) == goes_on | ends, said
            assert state.is_complete == (not goes_on)
            if state.is_complete:
                break
            token = chance.choice(sorted(goes_on))
            state.accept(token)
            said += TINY.texts[token]
        assert said in language
        assert not state.fault


def test_every_end_of_the_sequence_is_allowed_where_the_grammar_is_satisfied_and_only_there(
    grammars: Grammars,
) -> None:
    state = state_of(grammars, "start: /a+/", ends=(END, TURN))

    assert not allowed(grammars, state) & {END, TURN, CALL}
    state.accept(ord("a"))
    assert allowed(grammars, state) >= {END, TURN, ord("a")}
    assert CALL not in allowed(grammars, state)


def test_without_ends_an_answer_goes_on_until_nothing_can_follow(grammars: Grammars) -> None:
    state = state_of(grammars, "start: /a{1,2}/", ends=())

    state.accept(ord("a"))
    assert allowed(grammars, state) == {ord("a")}
    assert not state.is_complete
    state.accept(ord("a"))
    assert state.is_complete
    assert allowed(grammars, state) == set()


def test_a_text_that_was_named_as_an_end_stays_allowed_as_text(grammars: Grammars) -> None:
    state = state_of(grammars, 'start: "ab"', ends=(ord("b"),))

    state.accept(ord("a"))
    assert allowed(grammars, state) == {ord("b")}


def test_a_control_token_comes_where_it_is_named(grammars: Grammars) -> None:
    state = state_of(grammars, f'start: "a" <[{CALL}]> "b"')

    assert allowed(grammars, state) & TINY.control_ids == set()
    state.accept(ord("a"))
    assert allowed(grammars, state) == {CALL}
    state.accept(CALL)
    assert allowed(grammars, state) == {ord("b")}


def test_masks_after_drafts_are_those_after_the_tokens_and_change_nothing(
    grammars: Grammars,
) -> None:
    state = state_of(grammars, 'start: %json {"type": "array", "items": {"type": "integer"}}')
    drafts = b"[1, 23"

    found = masks(grammars, state, *drafts)

    for mask, token in zip(found, [*drafts, None], strict=True):
        assert allowed(grammars, state) == mask
        if token is not None:
            state.accept(token)


@pytest.mark.parametrize("drafts", [b"ax", [ord("a"), END], [ord("a"), CALL]])
def test_after_a_draft_that_cannot_come_or_ends_nothing_is_asked_for(
    grammars: Grammars, drafts: Sequence[int]
) -> None:
    state = state_of(grammars, "start: /a+b/")

    first, second, third = masks(grammars, state, *drafts)

    assert (ord("b") in first, ord("b") in second, third) == (False, True, set())
    assert allowed(grammars, state) == first


def test_drafts_may_complete_an_answer(grammars: Grammars) -> None:
    state = state_of(grammars, 'start: "ab"')

    found = masks(grammars, state, *b"ab", ord("b"))

    assert found[2:] == [{END}, set()]
    assert not state.is_complete


def test_a_token_that_the_grammar_does_not_allow_ends_in_a_fault(grammars: Grammars) -> None:
    state = state_of(grammars, 'start: "ab"')

    assert state.allows(ord("a"))
    assert not state.allows(ord("b"))
    state.accept(ord("b"))

    assert state.fault
    assert not state.allows(ord("a"))
    assert not state.is_complete
    assert masks(grammars, state, ord("a")) == [set(), set()]


def test_a_guess_at_what_follows_leaves_a_control_token_to_come(grammars: Grammars) -> None:
    state = state_of(grammars, f'start: <[{CALL}]> "x"')

    assert state.likely() == []
    assert allowed(grammars, state) == {CALL}


def test_a_grammar_that_derives_nothing_is_a_fault_of_its_first_mask(grammars: Grammars) -> None:
    state = state_of(grammars, "start: start")

    assert allowed(grammars, state) == set()
    assert state.fault


def test_several_answers_of_one_grammar_do_not_touch_each_other(grammars: Grammars) -> None:
    one, other = (state_of(grammars, 'start: "ab"') for _ in range(2))

    one.accept(ord("a"))

    assert ord("b") in allowed(grammars, one)
    assert ord("b") not in allowed(grammars, other)


def test_masks_of_many_are_one_question(grammars: Grammars) -> None:
    states = [state_of(grammars, f'start: "{letter}"') for letter in "abc"]

    found = grammars.masks([(state, ()) for state in states]).result(20.0)

    assert [min(ids(mask)) for [mask] in found] == [*b"abc"]


def test_a_bad_grammar_fails_alone_and_in_words(grammars: Grammars) -> None:
    bad, good = asked(grammars, "start: /[/", 'start: "a"')

    assert isinstance(bad, str)
    assert "unclosed" in bad
    assert isinstance(good, GrammarState)


def test_a_model_without_a_vocabulary_says_so() -> None:
    grammars = Grammars(without_vocabulary, SIZE)

    assert asked(grammars, 'start: "a"') == ["the model has no vocabulary"]
    grammars.close()


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled() -> None:
    is_read, may_go_on = threading.Event(), threading.Event()

    def read() -> Vocabulary:
        is_read.set()
        assert may_go_on.wait(20.0)
        return vocabulary()

    grammars = Grammars(read, SIZE)
    for number in range(3):
        grammars.ask(number, of_text(Demand(f'start: "{number}"', "here")), (END,))
    assert is_read.wait(20.0)
    for number in (0, 1):  # the first is under way
        grammars.give_up(number)
    may_go_on.set()
    told: list[int] = []
    while 2 not in told:
        assert select.select(grammars.fds, [], [], 20.0)[0], "nothing comes"
        told += [number for number, _ in grammars.take()]
    grammars.close()

    assert told == [0, 2]
    assert len(grammars._compiled) == 2


class Panic(BaseException):
    """What Rust's panics become is no Exception."""


def test_a_panic_is_answered_like_any_other_failure() -> None:
    def read() -> Vocabulary:
        raise Panic

    grammars = Grammars(read, SIZE)
    [outcome] = asked(grammars, 'start: "a"')
    grammars.close()

    assert outcome == "it could not be compiled: Panic"


def test_the_vocabulary_is_read_once_and_at_the_first_grammar() -> None:
    read: list[str] = []

    def reading() -> Vocabulary:
        read.append(threading.current_thread().name)
        return vocabulary()

    grammars = Grammars(reading, SIZE)
    assert (read, grammars.fds, grammars.take()) == ([], [], [])
    asked(grammars, 'start: "a"', 'start: "b"')
    grammars.close()

    assert len(read) == 1
    assert read != [threading.current_thread().name]


def test_more_grammars_than_are_kept_are_compiled_again(grammars: Grammars) -> None:
    larks = [f'start: "{number}"' for number in range(KEPT + 2)]

    for outcome in asked(grammars, *larks, larks[0]):
        assert isinstance(outcome, GrammarState)
    assert len(grammars._compiled) == KEPT


def test_a_grammar_is_compiled_anew_after_a_fault(grammars: Grammars) -> None:
    """Answers share its lexer, whose limits one of them may have reached."""
    state = state_of(grammars, 'start: "ab"')
    [before] = grammars._compiled.values()
    assert isinstance(state_of(grammars, 'start: "ab"'), GrammarState)
    assert [*grammars._compiled.values()] == [before]

    state.accept(ord("b"))
    fresh = state_of(grammars, 'start: "ab"')

    assert [*grammars._compiled.values()] != [before]
    assert allowed(grammars, fresh)


def test_what_has_to_come_next_is_guessed_in_long_tokens(grammars: Grammars) -> None:
    state = state_of(grammars, f'start: "abcabé" <[{CALL}]> "x" /[yz]/')

    def words() -> list[bytes]:
        return [TINY.texts[token] for token in state.likely()]

    assert words() == [b"abc", b"ab", "é".encode()]
    for token in state.likely():
        state.accept(token)
    assert words() == []
    state.accept(CALL)
    assert words() == [b"x"]
    state.accept(ord("x"))
    assert words() == []
    state.accept(CALL)
    assert (bool(state.fault), words()) == (True, [])


class CountedMatcher:
    """A matcher that counts how often it was asked for the text that has to come next."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._matcher, name)

    def deep_copy(self) -> llguidance.LLMatcher:
        """Return what is asked for it."""
        self.asked += 1
        return self._matcher.deep_copy()


def test_a_long_text_that_has_to_come_is_looked_for_once(grammars: Grammars) -> None:
    tokenizer = grammars._tokenizer()
    lark = f'start: "{"ab" * 1000}" /b?/ "aa"'
    matcher = CountedMatcher(llguidance.LLMatcher(tokenizer, of_text(Demand(lark, "here"))))
    state = GrammarState(matcher, tokenizer, SIZE, (END,))  # type: ignore[arg-type]

    for _ in range(999):
        assert TINY.texts[state.likely()[0]] == b"ab"
        state.accept(TINY.texts.index(b"ab"))
    assert matcher.asked == 1

    state.accept(TINY.texts.index(b"a"))
    assert TINY.texts[state.likely()[0]] == b"b"
    assert matcher.asked == 1
    state.accept(TINY.texts.index(b"b"))
    assert state.likely() == []
    state.accept(TINY.texts.index(b"b"))
    assert TINY.texts[state.likely()[0]] == b"aa"


def test_what_is_compiled_when_the_model_goes_tells_nobody() -> None:
    started, may_finish = threading.Event(), threading.Event()

    def slow() -> Vocabulary:
        started.set()
        assert may_finish.wait(20.0)
        return vocabulary()

    grammars = Grammars(slow, SIZE)
    grammars.ask(1, of_text(Demand('start: "a"', "here")), ())
    assert started.wait(20.0)
    grammars.close()
    may_finish.set()
    grammars._compilers.shutdown(wait=True)

    assert (grammars.fds, grammars.take()) == ([], [])


# The vocabulary of a checkpoint


def same(vocabulary: Vocabulary, tokenizer: Tokenizer) -> bool:
    """Whether they agree on what every token is."""
    assert len(vocabulary.texts) == tokenizer.vocab_size
    texts = [tokenizer.bytes_of(token_id) for token_id in range(tokenizer.vocab_size)]
    return (vocabulary.texts, vocabulary.control_ids) == (texts, tokenizer.control_ids)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_the_vocabulary_of_a_gguf_file_is_the_tokenizers(tmp_path: Path, pre: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata_of(trained(pre), pre))

    assert same(Vocabulary.from_checkpoint(path), Tokenizer.from_gguf(GGUFFile.open(path)))


def test_the_vocabulary_of_a_directory_is_the_tokenizers(tmp_path: Path) -> None:
    backend = trained("qwen2")
    backend.add_tokens([AddedToken("<道具>", special=False, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    late = {"content": "<|late|>", "special": True, "lstrip": False}
    declared = {str(backend.get_vocab_size()): late}
    config = {"added_tokens_decoder": declared, "eos_token": SPECIALS[0]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    found = Vocabulary.from_checkpoint(tmp_path)

    assert same(found, Tokenizer.from_directory(tmp_path))
    assert found.texts[-1] == b"<|late|>"
    assert "<道具>".encode() in found.texts


def test_a_directory_needs_no_tokenizer_config(tmp_path: Path) -> None:
    trained("smollm").save(str(tmp_path / "tokenizer.json"))

    assert same(Vocabulary.from_checkpoint(tmp_path), Tokenizer.from_directory(tmp_path))


@pytest.mark.parametrize("text", [None, "{", '{"model": {"vocab": []}}', "[]"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(CheckpointError, match=re.escape("tokenizer.json")):
        Vocabulary.from_checkpoint(tmp_path)


def test_a_gguf_file_without_a_vocabulary_says_so(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bare.gguf", {"llama.block_count": 1})

    with pytest.raises(CheckpointError, match="no vocabulary"):
        Vocabulary.from_checkpoint(path)
