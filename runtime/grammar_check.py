"""Whether a grammar can be enforced, before the device is asked; what llguidance found, in words.

It asks llguidance with a vocabulary of single bytes and the model's control tokens: enough to know
whether every rule can be read and the first character be written, and made in milliseconds, where
the whole vocabulary takes up to a second. Grammars of the last requests are known. All of it
blocks, for up to 0.1 s, without the interpreter's lock.

What llguidance only warns of would be ignored (a keyword of a schema), so it is refused too.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol

import llguidance

from cortex.ipc.errors import InvalidRequest
from cortex.models.checkpoints.token_bytes import TokenTable

KEPT = 1024
"""Verdicts, of 16 bytes and mostly no text."""
MAX_WORDS = 500
"""Characters of what llguidance found; it quotes the whole grammar."""

_EXCERPT = re.compile(r"\n +\d+ \|.*", re.DOTALL)
_PLACE = re.compile(r"^(?:at )?\d+\(\d+\): ")
_NOISE = re.compile(r"^failed to compile JSON schema: ")


class ControlTokens(Protocol):
    """What is asked of a model's tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def control_ids(self) -> frozenset[int]:
        """Those of tokens that are no text."""

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token."""


class GrammarCheck:
    """Checks the grammars for one model; several threads may ask."""

    def __init__(
        self,
        kept: int = KEPT,
        read: Callable[[str, llguidance.LLTokenizer], str] | None = None,
    ) -> None:
        """*read* returns what is wrong with a grammar, as ``fault_of`` does, which is the rule."""
        self._kept = kept
        self._read = read or fault_of
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._found: OrderedDict[bytes, str] = OrderedDict()

    def refuse_bad(self, grammar: str, tokens: ControlTokens, place: str) -> None:
        """Raise InvalidRequest, naming *place*, where *grammar* cannot be enforced."""
        key = blake2b(grammar.encode(), digest_size=16).digest()
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
            vocabulary = self._vocabulary = self._vocabulary or _small(tokens)
        if found is None:
            found = self._read(grammar, vocabulary)
            self._remember(key, found)
        if found:
            raise InvalidRequest(f"{place}: {found}", param=place)

    def _remember(self, key: bytes, found: str) -> None:
        with self._lock:
            self._found[key] = found
            while len(self._found) > self._kept:
                self._found.popitem(last=False)


def fault_of(grammar: str, vocabulary: llguidance.LLTokenizer) -> str:
    """Return what is wrong with *grammar*; nothing where nothing is."""
    _, found = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    if found:
        return _words(found[0])
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    mask = array("I", bytes(-(-vocabulary.vocab_size // 32) * 4))
    matcher.unsafe_compute_mask_ptr(mask.buffer_info()[0], len(mask) * mask.itemsize)
    end = vocabulary.eos_token
    is_over = not any(mask[: end // 32]) and mask[end // 32] == 1 << end % 32
    if matcher.is_error() or is_over:
        return "no text is what it asks for"
    return ""


def _words(found: str) -> str:
    """Return what llguidance *found* without its excerpt, on one line."""
    words = _NOISE.sub("", _PLACE.sub("", _EXCERPT.sub("", found)))
    return " ".join(words.split())[:MAX_WORDS]


def _small(tokens: ControlTokens) -> llguidance.LLTokenizer:
    """Return single bytes under the first ids that are free, and the control tokens."""
    texts = [b""] * max(tokens.vocab_size, 256 + len(tokens.control_ids))
    for token_id in tokens.control_ids:
        texts[token_id] = tokens.bytes_of(token_id)
    free = (i for i in range(len(texts)) if i not in tokens.control_ids)
    for byte, token_id in zip(range(256), free, strict=False):
        texts[token_id] = bytes([byte])
    table = TokenTable(texts, sorted(tokens.control_ids))
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(table), slices=[])
