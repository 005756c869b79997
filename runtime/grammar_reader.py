"""The child process that reads grammars: ``python -m cortex.runtime.grammar_reader PARENT BYTES``.

A process of its own, because what llguidance takes to read a grammar is not bounded by the
grammar's length and cannot be stopped: ``{"multipleOf": 99999989}`` takes minutes and gigabytes.
Its memory is bounded (RLIMIT_AS); its time is its parent's to bound, who kills it. The kernel kills
it when its parent goes.

A question is a line of JSON on stdin, an answer one on stdout; the first line says that it is
ready, some 0.2 s after its start.

It asks llguidance with a vocabulary of single bytes and the model's control tokens, under the
limits of the device: enough to know whether every rule can be read and the first tokens be written.
What llguidance only warns of would be ignored (a keyword of a schema), so it is refused too.
"""

from __future__ import annotations

import re
import resource
import sys
from array import array
from collections import OrderedDict

import llguidance
import msgspec

from cortex.models.checkpoints.token_bytes import TokenTable
from cortex.runtime.lifeline import die_with_parent

READY = b"ready\n"
MAX_LEXER_STATES = 100_000
"""Of one grammar, 1 to 2 kB each, as on the device."""
MAX_WORDS = 500
"""Characters of what llguidance found; it quotes the whole grammar."""
TRIED_TOKENS = 3
"""After each that may come first: a limit that is not met in reading shows there, if anywhere."""
KEPT = 4
"""Vocabularies."""

_EXCERPT = re.compile(r"\n +\d+ \|.*", re.DOTALL)
_PLACE = re.compile(r"^(?:at )?\d+\(\d+\): ")
_OVER = "NoExtension"
_SET = re.compile(rb"[^\0]")
_NOISE = re.compile(r"^failed to compile JSON schema: |<non-verbose/>")


class Question(msgspec.Struct, frozen=True):
    """Whether *grammar* can be enforced for a model with these control tokens, by their ids."""

    grammar: str
    control: dict[int, bytes]


class Reader:
    """Reads grammars; it knows the last vocabularies."""

    def __init__(self) -> None:
        self._vocabularies: OrderedDict[frozenset[tuple[int, bytes]], llguidance.LLTokenizer] = (
            OrderedDict()
        )

    def answer(self, question: Question) -> str:
        """Return what is wrong with a grammar; nothing where nothing is."""
        try:
            return fault_of(question.grammar, self._vocabulary(question.control))
        except BaseException as exc:
            if type(exc).__name__ != "PanicException":  # what Rust's panics are here
                raise
            return "it could not be compiled"

    def _vocabulary(self, control: dict[int, bytes]) -> llguidance.LLTokenizer:
        key = frozenset(control.items())
        known = key in self._vocabularies
        self._vocabularies[key] = self._vocabularies.pop(key) if known else _small(control)
        while len(self._vocabularies) > KEPT:
            self._vocabularies.popitem(last=False)
        return self._vocabularies[key]


def fault_of(grammar: str, vocabulary: llguidance.LLTokenizer) -> str:
    """Return what is wrong with *grammar*; nothing where nothing is."""
    limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    _, found = llguidance.LLMatcher.validate_grammar_with_warnings(
        grammar, vocabulary, limits=limits
    )
    if found:
        return _words(found[0])
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    allowed = _allowed(matcher, vocabulary)
    if allowed in ([], [vocabulary.eos_token]):
        return _fault(matcher) or "no text is what it asks for"
    branches = [matcher] + [_after(matcher, token_id) for token_id in allowed]
    faults = (_tried(branch, vocabulary) for branch in branches)
    return next((fault for fault in faults if fault), "")


def _tried(matcher: llguidance.LLMatcher, vocabulary: llguidance.LLTokenizer) -> str:
    """Return what fails at the next tokens, each the first that may come."""
    for _ in range(TRIED_TOKENS):
        if matcher.is_error():
            break
        matcher.deep_copy().compute_ff_bytes()  # with the same lexer, as the device guesses ahead
        allowed = _allowed(matcher, vocabulary)
        if matcher.is_stopped() or allowed[:1] in ([], [vocabulary.eos_token]):
            break
        matcher.consume_token(allowed[0])
    return _fault(matcher)


def _fault(matcher: llguidance.LLMatcher) -> str:
    """Return why *matcher* cannot go on; nothing where only its text is over."""
    words = _words(matcher.get_error()) if matcher.is_error() else ""
    return "" if words.startswith(_OVER) else words


def _after(matcher: llguidance.LLMatcher, token_id: int) -> llguidance.LLMatcher:
    ahead = matcher.deep_copy()
    ahead.consume_token(token_id)
    return ahead


def _allowed(matcher: llguidance.LLMatcher, vocabulary: llguidance.LLTokenizer) -> list[int]:
    """Return the tokens that may come next."""
    mask = array("I", bytes((vocabulary.vocab_size // 32 + 1) * 4))
    matcher.unsafe_compute_mask_ptr(mask.buffer_info()[0], len(mask) * mask.itemsize)
    return [
        8 * found.start() + bit
        for found in _SET.finditer(mask.tobytes())
        for bit in range(8)
        if found[0][0] >> bit & 1
    ]


def _words(found: str) -> str:
    """Return what llguidance *found* without its excerpt, on one line."""
    words = _NOISE.sub("", _PLACE.sub("", _EXCERPT.sub("", found)))
    return " ".join(words.split())[:MAX_WORDS]


def _small(control: dict[int, bytes]) -> llguidance.LLTokenizer:
    """Return single bytes under the first ids that are free, and the control tokens."""
    texts = [b""] * max(256 + len(control), max(control, default=0) + 1)
    for token_id, text in control.items():
        texts[token_id] = text
    free = (i for i in range(len(texts)) if i not in control)
    for byte, token_id in zip(range(256), free, strict=False):
        texts[token_id] = bytes([byte])
    table = TokenTable(texts, sorted(control))
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(table), slices=[])


def main(parent: int, memory_bytes: int) -> None:
    """Answer questions until stdin ends."""
    die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = Reader()
    questions = msgspec.json.Decoder(Question)
    _say(READY)
    for line in sys.stdin.buffer:
        _say(msgspec.json.encode(reader.answer(questions.decode(line))) + b"\n")


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
