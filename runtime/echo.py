"""The prompt of a text completion, as the beginning of its answer (``echo``).

What is shown is the text that was asked with; of token ids all of them as text, control tokens
too. Where log probabilities are asked for, the prompt's tokens have theirs, which the device tells
as it computes them; the first token has none, since nothing is before it.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt's text and its tokens, with the character that each token's text begins at."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int]


def echo_of(
    prompt: str | Sequence[int], token_ids: Sequence[int], bytes_of: Callable[[int], bytes]
) -> Echo:
    """Return the echo of *prompt*, whose tokens are *token_ids*."""
    pieces = [bytes_of(token_id) for token_id in token_ids]
    if isinstance(prompt, str) and not prompt.encode().startswith(pieces[0]):
        pieces[0] = b""  # the tokeniser has put it before the text
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(piece) for piece in pieces]
    text = prompt if isinstance(prompt, str) else "".join(texts) + decoder.decode(b"", final=True)
    begins = itertools.accumulate(map(len, texts), initial=0)
    return Echo(text, token_ids, [min(at, len(text)) for at, _ in zip(begins, texts, strict=False)])
