"""Token ids to text as they arrive: whole characters only, and never a part of a stop string.

A character may be split over several tokens, a stop string over several texts. What cannot be
sent yet waits here; ``flush`` returns it when nothing more will come. The pieces laid end to end
equal ``Tokenizer.decode`` of all ids, however they were split.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from cortex.runtime.held_text import could_begin
from cortex.runtime.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one answer into text.

    *hidden_ids* are not shown, and of control tokens only *shown_ids*.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        hidden_ids: Iterable[int] = (),
        shown_ids: Iterable[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden_ids = tokenizer.control_ids.difference(shown_ids).union(hidden_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_within_character = False

    def add(self, token_ids: Sequence[int]) -> str:
        """Return the text that *token_ids* complete."""
        texts = [self._text_of(i) for i in token_ids if i not in self._hidden_ids]
        return texts[0] if len(texts) == 1 else "".join(texts)

    def _text_of(self, token_id: int) -> str:
        if not self._is_within_character:
            text = self._tokenizer.text_of(token_id)
            if text is not None:  # as nearly always
                return text
        text = self._decoder.decode(self._tokenizer.bytes_of(token_id))
        self._is_within_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """Return what is left: � for the bytes of a character that never became whole."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Watches the text of one answer for the stop string that is complete first.

    Of two that end at the same place the longer wins, so how the text is split does not matter.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self.hit: str | None = None
        """The stop string that was found."""
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that may be sent now, and whether a stop string was found.

        Once one is found, it and everything after it are dropped, here and in later calls.
        """
        if not self._stops:
            return text, False
        if self.hit is not None:
            return "", True
        self._held += text
        hits = [(at + len(s), at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if hits:
            _, start, self.hit = min(hits)
            sent, self._held = self._held[:start], ""
            return sent, True
        safe = len(self._held) - could_begin(self._held, self._stops)
        sent, self._held = self._held[:safe], self._held[safe:]
        return sent, False

    def flush(self) -> str:
        """Return what was held back; nothing more will come."""
        sent, self._held = self._held, ""
        return sent
