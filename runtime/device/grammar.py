"""Answers that keep to a grammar: which tokens may come next, and where an answer is complete.

    main thread                             threads of its own
    ask(sequence, grammar)    ─ compile ─►  read the vocabulary, once; llguidance's reading of it,
    take() ◄─ eventfd ─────── ◄──────────   once; the grammar, unless it is one of the last
    masks([...])              ── mask ───►  a bit per token, and for drafts what follows them
    forward pass                            ... meanwhile
    the sampler looks: result()

A sequence waits for its own grammar, nobody else does. Its masks are computed while the forward
pass runs that they are for. What follows from a grammar depends on the tokens of the answer alone,
so company and preemption change nothing.

The end: where the grammar is satisfied, the tokens that end the sequence are allowed beside those
that go on; where nothing can go on, the answer is complete and ends without one. A control token is
allowed where the grammar names it, or as an end. A text that the client named as an end is also
allowed where it is text of the grammar, and ends the answer there, as a stop string does.

``LLTokenizer`` is made in one call that keeps the interpreter's lock: 0.05 s for 49,000 tokens,
0.25 s for 200,000 (2 cores, 2026-11-21), and once more as long for its tables of slices. Steps wait
that long, twice, at a model's first grammar.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import llguidance
import structlog
import torch
from torch import Tensor

from cortex.ipc.descriptors import Descriptor, wake_up
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.token_bytes import TokenTable
from cortex.runtime.device.vocabulary import Vocabulary

KEPT = 32
"""Compiled grammars of a model."""
MAX_LEXER_STATES = 100_000
"""Of one grammar, 1 to 2 kB each."""
MAX_WORDS = 300
"""Characters of what llguidance says of a failure."""

Asked = tuple["GrammarState", Sequence[int]]
"""A state, and the tokens drafted after it."""
_CONTROL = b"\xff"
"""What llguidance writes a control token with; no text has it."""
_GUESSED_BYTES = 256
"""Of a text that has to come next only the beginning becomes tokens: it may be a whole document."""
_log = structlog.get_logger()


class GrammarState:
    """Where one answer stands in its grammar; its masks are asked of ``Grammars``.

    ``fault`` says why it cannot go on; nothing is allowed then.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        tokenizer: llguidance.LLTokenizer,
        vocab_size: int,
        ends: Sequence[int],
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        self.fault = ""
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = frozenset(ends)
        self._on_fault = on_fault
        self._forced = b""  # the text that has to come next, as far as it was looked for
        self._lock = threading.Lock()  # llguidance raises where two threads meet

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        with self._lock:
            return not self.fault and self._matcher.is_stopped()

    def accept(self, token_id: int) -> None:
        """Go on with a token of the answer that is not its end."""
        with self._lock:
            if not self.fault and not self._matcher.consume_token(token_id):
                self._fail()
            if self._forced:
                text = self._tokenizer.decode_bytes([token_id])
                is_known = self._forced.startswith(text)
                self._forced = self._forced[len(text) :] if is_known else b""

    def allows(self, token_id: int) -> bool:
        """Whether the grammar allows *token_id* next."""
        with self._lock:
            return not self.fault and self._matcher.validate_tokens([token_id]) == 1

    def likely(self) -> list[int]:
        """Return tokens of the text that has to come next, as long ones as there are.

        Others may stand for the same text, and the model may choose them: it is a guess.
        """
        with self._lock:
            if self.fault:
                return []
            if not self._forced:  # of a copy: the original could not go on with a control token
                self._forced = self._matcher.deep_copy().compute_ff_bytes().split(_CONTROL)[0]
            text = self._forced[:_GUESSED_BYTES]
        return self._tokenizer.greedy_tokenize(text.decode(errors="ignore"))

    def masks(self, drafts: Sequence[int]) -> list[Tensor]:
        """Return what may come next, and after each of *drafts*: int32 [ceil(V / 32)] each.

        After a draft that may not come itself, nothing is asked for.
        """
        with self._lock:
            found = [self._mask()]
            ahead = self._matcher.deep_copy() if drafts and not self.fault else None
        for draft in drafts:
            if ahead is None or draft in self._ends or not ahead.try_consume_tokens([draft]):
                break
            found.append(self._mask_of(ahead))
        nothing = torch.zeros_like(found[0])
        return found + [nothing] * (1 + len(drafts) - len(found))

    def _mask(self) -> Tensor:
        mask = self._mask_of(self._matcher)
        if not self.fault and self._matcher.is_error():
            self._fail()
        return mask

    def _mask_of(self, matcher: llguidance.LLMatcher) -> Tensor:
        """Return what may come next; the bit behind the last token's is llguidance's own end."""
        mask = torch.zeros(self._vocab_size // 32 + 1, dtype=torch.int32)
        matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        if matcher.is_error():
            mask.zero_()
        elif _clear(mask, self._vocab_size):
            for token_id in self._ends:
                _set(mask, token_id)
        return mask[: -(-self._vocab_size // 32)]

    def _fail(self) -> None:
        said = self._matcher.get_error() or "a token that it does not allow"
        self.fault = said[:MAX_WORDS]
        self._on_fault()


class Grammars:
    """The grammars of one model; nothing is made before the first is asked for."""

    def __init__(self, read: Callable[[], Vocabulary], vocab_size: int) -> None:
        """*vocab_size* is that of the logits, V; *read* blocks, and raises CheckpointError."""
        self._read = read
        self._vocab_size = vocab_size
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._spoilt: SimpleQueue[str] = SimpleQueue()
        self._wake_up: Descriptor | None = None
        self._lock = threading.Lock()
        self._outcomes: SimpleQueue[tuple[int, GrammarState | str]] = SimpleQueue()
        self._asked: dict[int, Future[None]] = {}
        self._compilers = ThreadPoolExecutor(1, "grammar")
        self._maskers = ThreadPoolExecutor(1, "mask")

    @property
    def fds(self) -> list[int]:
        """Readable when ``take`` has something to give."""
        return [self._wake_up.fd] if self._wake_up else []

    def ask(self, sequence_id: int, grammar: str, ends: Sequence[int]) -> None:
        """Let ``take`` give the state of a sequence that *ends* by these tokens."""
        self._wake_up = self._wake_up or wake_up()
        self._asked[sequence_id] = self._compilers.submit(self._answer, sequence_id, grammar, ends)

    def give_up(self, sequence_id: int) -> None:
        """Ask no more for the state of a sequence; it may still be given."""
        future = self._asked.pop(sequence_id, None)
        if future:
            future.cancel()

    def take(self) -> list[tuple[int, GrammarState | str]]:
        """Return the states that were asked for and are ready, or why there is none."""
        if self._wake_up is None:
            return []
        try:
            count = os.eventfd_read(self._wake_up.fd)
        except BlockingIOError:
            return []
        taken = [self._outcomes.get_nowait() for _ in range(count)]
        for sequence_id, _ in taken:
            self._asked.pop(sequence_id, None)
        return taken

    def masks(self, asked: Sequence[Asked]) -> Future[list[list[Tensor]]]:
        """Begin to compute ``GrammarState.masks`` of each; none may be touched until then."""
        return self._maskers.submit(lambda: [state.masks(drafts) for state, drafts in asked])

    def close(self) -> None:
        """Give up the threads; what they are at is not waited for."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._maskers.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            waker, self._wake_up = self._wake_up, None
        if waker:
            waker.close()

    def _answer(self, sequence_id: int, grammar: str, ends: Sequence[int]) -> None:
        """Compile, and let the main thread know, whatever comes of it."""
        outcome: GrammarState | str
        try:
            outcome = self._state(grammar, ends)
        except (CheckpointError, ValueError) as exc:
            outcome = str(exc)[:MAX_WORDS]
        except BaseException as exc:  # noqa: BLE001 - also a panic: somebody waits for the answer
            _log.exception("a grammar could not be compiled")
            outcome = f"it could not be compiled: {type(exc).__name__}"
        with self._lock:
            if self._wake_up:  # else the model is gone
                self._outcomes.put((sequence_id, outcome))
                os.eventfd_write(self._wake_up.fd, 1)

    def _state(self, grammar: str, ends: Sequence[int]) -> GrammarState:
        """Return the start of an answer; raise ValueError for what is no grammar.

        Answers of one grammar share its lexer, and so its limits: after a fault it begins anew.
        """
        while not self._spoilt.empty():
            self._compiled.pop(self._spoilt.get(), None)
        tokenizer = self._tokenizer()
        matcher = self._compiled.pop(grammar, None) or _compiled(tokenizer, grammar)
        self._compiled[grammar] = matcher
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return GrammarState(
            matcher.deep_copy(),
            tokenizer,
            self._vocab_size,
            ends,
            on_fault=partial(self._spoilt.put, grammar),
        )

    def _tokenizer(self) -> llguidance.LLTokenizer:
        if self._vocabulary is None:
            self._vocabulary = _as_llguidance_wants(self._read(), self._vocab_size)
        return self._vocabulary


def _compiled(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _as_llguidance_wants(vocabulary: Vocabulary, vocab_size: int) -> llguidance.LLTokenizer:
    """Return *vocabulary* with an end of its own at *vocab_size*, which no model knows."""
    texts = vocabulary.texts[:vocab_size]
    texts += [b""] * (vocab_size - len(texts))
    control = sorted(i for i in vocabulary.control_ids if i < vocab_size)
    table = llguidance.TokenizerWrapper(TokenTable(texts, control))
    bare = llguidance.LLTokenizer(table, slices=[])
    return bare.with_slices(llguidance.LLTokenizer.general_slices())


def _clear(mask: Tensor, bit: int) -> bool:
    """Clear a bit; return whether it was set."""
    word = int(mask[bit // 32]) & 0xFFFFFFFF
    is_set = bool(word >> bit % 32 & 1)
    _put(mask, bit // 32, word & ~(1 << bit % 32))
    return is_set


def _set(mask: Tensor, bit: int) -> None:
    _put(mask, bit // 32, int(mask[bit // 32]) & 0xFFFFFFFF | 1 << bit % 32)


def _put(mask: Tensor, at: int, word: int) -> None:
    mask[at] = word - (1 << 32) if word >> 31 else word
