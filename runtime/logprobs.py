r"""Log probabilities of an answer's tokens, each given out with the text that it is a part of.

A token's text may wait: for the rest of its character, or because it could begin a stop string. Its
entry waits as long. Offsets count characters of the answer, as the detokenizer makes them:

    token     Hel   lo,   \xf0\x9f   \x98\x80   ST      OP         (the stop string is STOP)
    begins    0     3     6          6          7       9
    ends      3     6     7          7          9       11
    given out at once     with the character    never: their text is not shown

A control token that nobody sees ends where the next text does. The token that ended the sequence is
no part of the answer and has no entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from cortex.ipc.openai_answers import TokenLogprob, TopLogprob
from cortex.ipc.ring import TokenRecord


class Scored(NamedTuple):
    """One token of an answer, and the character that its text begins at."""

    offset: int
    token: TokenLogprob


class Logprobs:
    """Those of one answer; *bytes_of* says what a token is."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._tops: list[TopLogprob] = []
        self._textless: list[Scored] = []
        self._waiting: list[tuple[int, Scored]] = []
        self._ready: list[Scored] = []
        self._characters = 0

    def top(self, record: TokenRecord) -> None:
        """Note a likeliest token for the position of the next ``token``."""
        if math.isfinite(record.logprob):
            token, said = self._said(record.token_id)
            self._tops.append(TopLogprob(token, record.logprob, said))

    def token(self, record: TokenRecord, text: str) -> None:
        """Note a token of the answer, which made *text* final."""
        tops, self._tops = self._tops, []
        token, said = self._said(record.token_id)
        entry = TokenLogprob(token, _finite(record.logprob), said, tops)
        self._textless.append(Scored(self._characters, entry))
        self.text(text)

    def text(self, text: str) -> None:
        """Note *text*, which the tokens so far have made final."""
        if text:
            self._characters += len(text)
            self._waiting += [(self._characters, scored) for scored in self._textless]
            self._textless.clear()

    def shown(self, characters: int) -> None:
        """Let out the tokens that end within the first *characters*."""
        while self._waiting and self._waiting[0][0] <= characters:
            self._ready.append(self._waiting.pop(0)[1])

    def cut(self, characters: int) -> None:
        """Let out what begins within the first *characters*; the rest is never shown."""
        self._ready += [scored for _, scored in self._waiting if scored.offset < characters]
        self._waiting.clear()
        self._textless.clear()

    def end(self) -> None:
        """Let out everything; nothing follows."""
        self._ready += [scored for _, scored in self._waiting] + self._textless
        self._waiting.clear()
        self._textless.clear()

    def take(self) -> list[Scored]:
        """Return what was let out since the last call."""
        taken, self._ready = self._ready, []
        return taken

    def _said(self, token_id: int) -> tuple[str, list[int]]:
        raw = self._bytes_of(token_id)
        return raw.decode(errors="replace"), list(raw)


def _finite(logprob: float) -> float | None:
    """Return what JSON can say of it."""
    return logprob if math.isfinite(logprob) else None
