"""A vocabulary of single bytes and a few longer tokens, and texts read by llguidance with it."""

from __future__ import annotations

import llguidance

from cortex.ipc.errors import InvalidRequest
from cortex.models.checkpoints.token_bytes import TokenTable
from cortex.runtime.grammar_reader import Question, Reader


class ByteVocabulary:
    """Ids 0 to 255 are bytes; *control* and *words* follow, those first."""

    def __init__(self, *control: str, words: tuple[str, ...] = ()) -> None:
        self.control = {text: 256 + i for i, text in enumerate(control)}
        self.control_ids = frozenset(self.control.values())
        self.texts = [bytes([i]) for i in range(256)]
        self.texts += [text.encode() for text in (*control, *words)]
        self.vocab_size = len(self.texts)

    @property
    def control_tokens(self) -> dict[int, bytes]:
        return {i: self.texts[i] for i in self.control_ids}

    def bytes_of(self, token_id: int) -> bytes:
        return self.texts[token_id]

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*: control tokens, and single bytes."""
        ids: list[int] = []
        while text:
            marker = next((m for m in self.control if text.startswith(m)), "")
            ids += [self.control[marker]] if marker else list(text[0].encode())
            text = text[len(marker) or 1 :]
        return ids


def refuse_bad(grammar: str, vocabulary: ByteVocabulary, place: str) -> None:
    """Raise for a grammar that cannot be enforced, as the neuron does, in this process."""
    found = Reader().answer(Question(grammar, vocabulary.control_tokens))
    if found:
        raise InvalidRequest(f"{place}: {found}", param=place)


def reads(grammar: str, text: str, vocabulary: ByteVocabulary) -> bool:
    """Whether *grammar* derives *text*."""
    matcher, ids = matcher_of(grammar, vocabulary), vocabulary.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def is_over_after(grammar: str, text: str, vocabulary: ByteVocabulary) -> bool:
    """Whether nothing can follow *text*."""
    matcher, ids = matcher_of(grammar, vocabulary), vocabulary.encode(text)
    assert matcher.try_consume_tokens(ids) == len(ids)
    return matcher.is_stopped()


def matcher_of(grammar: str, vocabulary: ByteVocabulary) -> llguidance.LLMatcher:
    """Return *grammar* at its start."""
    table = TokenTable(vocabulary.texts, sorted(vocabulary.control_ids))
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(table), slices=[])
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher
