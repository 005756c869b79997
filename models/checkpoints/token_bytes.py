"""The bytes that the tokens of a byte-level vocabulary stand for.

Such vocabularies (GPT-2, 2019) write each byte as one character, the printable ones as themselves.
"""

from __future__ import annotations


def _byte_alphabet() -> dict[str, int]:
    """Return the character that stands for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def token_bytes(text: str) -> bytes:
    """Return the bytes of the token that a vocabulary writes as *text*."""
    try:
        return bytes(BYTE_OF[character] for character in text)
    except KeyError:  # an added token, written as it reads
        return text.encode()


class TokenTable:
    """Bytes by token id, as ``llguidance.TokenizerWrapper`` asks for them.

    The last one is an end of answers that no model knows, so where it is allowed says where an
    answer may end, whatever the model's own ends are. ``control_ids`` are those of no text.
    """

    bos_token_id = None

    def __init__(self, texts: list[bytes], control_ids: list[int]) -> None:
        self.tokens = [*texts, b"<end of the answer>"]
        self.eos_token_id = len(texts)
        self.special_token_ids = [*control_ids, self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        """Cut no text: grammars whose texts nobody forces (``no_forcing``) do not ask for it."""
        del text
        return []
