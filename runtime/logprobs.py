r"""Log probabilities of an answer's tokens, each given out with the text that it is a part of.

A token's text may wait: for the rest of its character, or because it could begin a stop string. Its
entry waits as long. Offsets count characters of the answer, as the detokenizer makes them:

    token     Hel   lo,   \xf0\x9f   \x98\x80   ST      OP         (the stop string is STOP)
    begins    0     3     6          6          7       9
    ends      3     6     7          7          9       11
    given out at once     with the character    never: their text is not shown

A control token that nobody sees ends where the next text does. The token that ended the sequence is
no part of the answer and has no entry. Where the prompt is echoed, its tokens come first, all at
once, and the offsets of the answer's go on from its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from cortex.ipc.openai_answers import TokenLogprob, TopLogprob
from cortex.ipc.ring import TokenRecord
from cortex.runtime.echo import Echo


class Scored(NamedTuple):
    """One token of an answer, and the character that its text begins at."""

    offset: int
    token: TokenLogprob


class Logprobs:
    """Those of one answer, which may begin with an *echo*; *bytes_of* says what a token is."""

    def __init__(self, bytes_of: Callable[[int], bytes], echo: Echo | None = None) -> None:
        self._bytes_of = bytes_of
        self._echo = echo
        self._echoed: list[TokenLogprob] = []
        self._begin = len(echo.text) if echo else 0
        """Characters before the answer's own."""
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
        self._textless.append(Scored(self._begin + self._characters, self._entry(record)))
        self.text(text)

    def prompt_token(self, record: TokenRecord) -> None:
        """Note the next token of the prompt; the first one has no record."""
        self._echoed.append(self._entry(record))

    def prompt(self) -> None:
        """Let out the prompt, which has come to its end."""
        if self._echo is None:
            return
        token, said = self._said(self._echo.token_ids[0])
        entries = [TokenLogprob(token, None, said, []), *self._echoed]
        self._ready += map(Scored, self._echo.offsets, entries)

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
        end = self._begin + characters
        self._ready += [scored for _, scored in self._waiting if scored.offset < end]
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

    def _entry(self, record: TokenRecord) -> TokenLogprob:
        tops, self._tops = self._tops, []
        token, said = self._said(record.token_id)
        return TokenLogprob(token, _finite(record.logprob), said, tops)

    def _said(self, token_id: int) -> tuple[str, list[int]]:
        raw = self._bytes_of(token_id)
        return raw.decode(errors="replace"), list(raw)


def _finite(logprob: float) -> float | None:
    """Return what JSON can say of it."""
    return logprob if math.isfinite(logprob) else None
