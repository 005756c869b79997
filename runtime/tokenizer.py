"""Text to token ids and back, with the tokenizer that the checkpoint brings along.

From inside a GGUF file (``tokenizer.ggml.*``: byte-level BPE, cut by the rules of
``pre_tokenizers.py``) or from a directory's tokenizer.json. Only byte-level tokenizers are read:
each token is a fixed string of bytes, and text is the bytes of its tokens laid end to end.

Control tokens written in a text are recognised, also where a user wrote them: a chat template
renders control tokens as text, so the rendered prompt cannot be read otherwise. transformers does
the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from cortex.ipc.errors import Unloadable
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.json import read_bytes, read_object
from cortex.models.checkpoints.token_bytes import token_bytes
from cortex.runtime.pre_tokenizers import PRE_TOKENIZERS

T = TypeVar("T")

MAX_TOKENIZER_BYTES = 1 << 26
"""Twice the largest tokenizer.json known."""

CONTROL, USER_DEFINED = 3, 4
"""``tokenizer.ggml.token_type`` of tokens that are found in text before it is cut."""


class Tokenizer:
    """A checkpoint's tokenizer; its methods may be called from several threads.

    ``special_tokens`` maps the roles a chat template knows (``bos_token``, ``eos_token``, ...) to
    the tokens' texts. ``fill_tokens`` are those that the checkpoint declares for filling in: before
    the prefix, the suffix and the answer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        fill_tokens: tuple[str, str, str] | None = None,
    ) -> None:
        added = backend.get_added_tokens_decoder()
        self.special_tokens = special_tokens
        self.fill_tokens = fill_tokens
        self.control_ids = frozenset(i for i, token in added.items() if token.special)
        self.markers = frozenset(token.content for token in added.values())
        """The texts of the tokens that are found in a text before it is cut, control tokens too."""
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Build the tokenizer that the metadata of *file* describes; raise Unloadable."""
        return _GGUFTokenizer(file).build()

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read the tokenizer.json and tokenizer_config.json of *path*; raise Unloadable."""
        try:
            text = read_bytes(path / "tokenizer.json", MAX_TOKENIZER_BYTES)
        except CheckpointError as exc:
            raise _unsupported(f"there is no readable tokenizer.json: {exc}") from exc
        backend = _library_object(lambda: tokenizers.Tokenizer.from_buffer(text), where=path)
        if not _is_byte_level(backend):
            raise _unsupported(f"{path}: only byte-level tokenizers are supported")
        config_path = path / "tokenizer_config.json"
        config = read_object(config_path) if config_path.exists() else {}
        _add_declared_tokens(backend, config, path)
        return cls(backend, _declared_special_tokens(config))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, control tokens included."""
        return self._backend.get_vocab_size()

    def id_of(self, token: str) -> int | None:
        """Return the id of the token that is written *token*."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, with_bos: bool = False) -> list[int]:
        """Return the ids of *text*.

        *with_bos* adds what this tokenizer puts around a plain text: a BOS token, or nothing.
        """
        # encode() would hold the interpreter's lock throughout, half a minute for 31 MB of text
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=with_bos)
        return encoding.ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of *token_ids* without control tokens; bytes that are no UTF-8 are �."""
        shown = (self.bytes_of(i) for i in token_ids if i not in self.control_ids)
        return b"".join(shown).decode(errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token; none for an id the vocabulary has no token for."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._look_up(token_id)
        return found

    def text_of(self, token_id: int) -> str | None:
        """Return the text of one token; None where its bytes are no whole characters."""
        try:
            return self._texts[token_id]
        except KeyError:
            text = self._texts[token_id] = _whole(self.bytes_of(token_id))
            return text

    def _look_up(self, token_id: int) -> bytes:
        text = self._backend.id_to_token(token_id)
        return b"" if text is None else token_bytes(text)


def _whole(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether text is the bytes of its tokens, as the decoder says.

    It is asked after the library has read the file: reading 11 MB of JSON for these few words held
    the interpreter's lock for 0.3 s.
    """
    if backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    return [step.get("type") for step in steps] == ["ByteLevel"]


def _add_declared_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], path: Path) -> None:
    """Add tokens that only tokenizer_config.json knows, as transformers does."""
    known = backend.get_added_tokens_decoder()
    declared = config.get("added_tokens_decoder") or {}
    for token_id, fields in sorted(((int(i), f) for i, f in declared.items()), key=lambda p: p[0]):
        if token_id in known:
            continue
        flags = {k: bool(fields.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized")}
        special = bool(fields.get("special"))
        backend.add_tokens([AddedToken(fields["content"], special=special, **flags)])
        if backend.token_to_id(fields["content"]) != token_id:
            raise _unsupported(
                f"{path}: tokenizer_config.json gives {fields['content']!r} the id {token_id}, "
                f"which tokenizer.json does not leave free"
            )


def _declared_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the named tokens of tokenizer_config.json; each is a text or an object with one."""
    found: dict[str, str] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


class _GGUFTokenizer:
    """Reads ``tokenizer.ggml.*`` of one file; what is missing or makes no sense is refused."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.metadata = file.metadata
        self.tokens: list[str] = self.array("tokens", str)

    def array(self, name: str, kind: type[T]) -> list[T]:
        """Return an array all of whose elements are *kind*."""
        values = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise _corrupt(f"{self.path}: tokenizer.ggml.{name} is missing or of the wrong type")
        return values

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        return bool(value)

    def named(self, name: str) -> str | None:
        """Return the text of the token that *name* (``bos``, ``eos``, ...) points to."""
        token_id = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            raise _corrupt(f"{self.path}: tokenizer.ggml.{name}_token_id is {token_id!r}")
        return self.tokens[token_id]

    def build(self) -> Tokenizer:
        """Return the tokenizer; raise Unloadable."""
        rule_name = self._rule_name()
        rule = PRE_TOKENIZERS[rule_name]
        backend = _library_object(
            lambda: tokenizers.Tokenizer(
                models.BPE(
                    vocab=self._vocabulary(),
                    merges=self._merges(),
                    ignore_merges=rule.ignore_merges,
                )
            ),
            where=self.path,
        )
        if normalizer := rule.normalizer():
            backend.normalizer = normalizer
        backend.pre_tokenizer = rule.build()
        backend.decoder = decoders.ByteLevel()
        self._add_tokens(backend)
        self._add_ends(backend, adds_bos=self.flag("add_bos_token", default=rule.adds_bos))
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        special = {f"{ours}_token": self.named(theirs) for theirs, ours in names.items()}
        named = {role: text for role, text in special.items() if text}
        return Tokenizer(backend, named, self._fill_tokens())

    def _fill_tokens(self) -> tuple[str, str, str] | None:
        """Return the tokens that the file declares for filling in, by today's names or older."""
        for names in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
            prefix, suffix, middle = map(self.named, names)
            if prefix and suffix and middle:
                return prefix, suffix, middle
        return None

    def _rule_name(self) -> str:
        model = self.metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise _unsupported(
                f"{self.path}: its tokenizer is of the kind {model!r}; supported: 'gpt2', which "
                f"is byte-level BPE"
            )
        name = self.metadata.get("tokenizer.ggml.pre")
        if name not in PRE_TOKENIZERS:
            raise _unsupported(
                f"{self.path}: tokenizer.ggml.pre is {name!r}; "
                f"supported: {', '.join(PRE_TOKENIZERS)}"
            )
        return str(name)

    def _vocabulary(self) -> dict[str, int]:
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if len(vocabulary) != len(self.tokens):
            raise _corrupt(f"{self.path}: tokenizer.ggml.tokens has a token twice")
        return vocabulary

    def _merges(self) -> list[tuple[str, str]]:
        pairs = [merge.partition(" ") for merge in self.array("merges", str)]
        if not all(left and right for left, _, right in pairs):
            raise _corrupt(f"{self.path}: tokenizer.ggml.merges has an entry that is no pair")
        return [(left, right) for left, _, right in pairs]

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        types = self.array("token_type", int)
        if len(types) != len(self.tokens):
            raise _corrupt(f"{self.path}: tokenizer.ggml.token_type and tokens differ in length")
        backend.add_tokens(
            [
                AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, kind in zip(self.tokens, types, strict=True)
                if kind in {CONTROL, USER_DEFINED}
            ]
        )

    def _add_ends(self, backend: tokenizers.Tokenizer, *, adds_bos: bool) -> None:
        """Put BOS, and where the file asks for it EOS, around a plain text."""
        bos = self.named("bos") if adds_bos else None
        eos = self.named("eos") if self.flag("add_eos_token", default=False) else None
        ends = [text for text in (bos, eos) if text]
        if ends:
            backend.post_processor = processors.TemplateProcessing(
                single=[part for part in (bos, "$A", eos) if part],
                special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(ends)],
            )


def _library_object(
    make: Callable[[], tokenizers.Tokenizer], *, where: Path
) -> tokenizers.Tokenizer:
    """Call *make*; the library raises bare Exceptions for what it cannot read."""
    try:
        return make()
    except Unloadable:
        raise
    except Exception as exc:
        raise _corrupt(f"{where}: the tokenizer cannot be read: {exc}") from exc


def _unsupported(message: str) -> Unloadable:
    return Unloadable(message, kind="tokenizer_unsupported")


def _corrupt(message: str) -> Unloadable:
    return Unloadable(message, kind="corrupt_checkpoint")
