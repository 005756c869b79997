"""A model's text side: from messages or text to token ids, and back; all of it without torch.

It is read from the checkpoint's files and kept by the supervisor. Its calls take milliseconds to
seconds for long prompts, so callers run them in a bounded thread pool.

A sequence ends at any of ``stop_token_ids``, which are

1. every eos id of generation_config.json, or of config.json where that file is silent; in a GGUF
   file its eos, eot and eom ids;
2. the tokenizer's own eos token;
3. of the tokens that usually end a turn (``TURN_ENDS``) those that are control tokens here and
   that the chat template writes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex.ipc.errors import InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.openai import ChatMessage
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.json import read_object
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.detokenizer import Detokenizer
from cortex.runtime.tokenizer import Tokenizer

TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling that the checkpoint recommends; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> GenerationDefaults:
        """Read generation_config.json; ``do_sample: false`` there means greedy.

        Raise CheckpointError for values that no request could ask for either.
        """
        temperature = _number(config, "temperature", 0.0, 2.0)
        if config.get("do_sample") is False:
            temperature = 0.0
        top_k = _number(config, "top_k", 0, 2**31 - 1)
        top_p = _number(config, "top_p", sys.float_info.min, 1.0)
        return cls(temperature, top_p, None if top_k is None else int(top_k))


def _number(config: dict[str, Any], name: str, least: float, most: float) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise CheckpointError(f"generation_config.json: {name} is {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class TextSide:
    """Everything the supervisor needs of one model to speak with it."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation: GenerationDefaults
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    """Of the weights, which may have rows that no token of the tokenizer uses."""

    @classmethod
    def from_checkpoint(cls, path: Path) -> TextSide:
        """Read the text side of a GGUF file or a directory; raise Unloadable."""
        try:
            return _read(path)
        except CheckpointError as exc:
            raise Unloadable(str(exc), kind="corrupt_checkpoint") from exc

    def chat_prompt(
        self, messages: Sequence[ChatMessage], template_kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """Return the prompt of a conversation; raise InvalidRequest or UnsupportedParameter.

        The template alone decides about BOS, as in transformers, so it is never there twice.
        """
        if self.template is None:
            raise UnsupportedParameter(
                "this model has no chat template, so it cannot chat: use /v1/completions",
                param="messages",
            )
        prompt = self.template.render(messages, template_kwargs)
        return self._encode(prompt, "messages", with_bos=False)

    def text_prompt(self, prompt: str) -> list[int]:
        """Return the ids of a plain text, with BOS where the tokenizer wants one."""
        return self._encode(prompt, "prompt", with_bos=True)

    def detokenizer(self) -> Detokenizer:
        """Return a detokenizer for one answer; what ends a sequence is not shown."""
        return Detokenizer(self.tokenizer, self.stop_token_ids)

    def _encode(self, text: str, param: str, *, with_bos: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, with_bos=with_bos)
        except TypeError as exc:  # all that tokenizers says of half a surrogate pair
            raise InvalidRequest("the text holds half a surrogate pair", param=param) from exc


def _read(path: Path) -> TextSide:
    checkpoint = Checkpoint.open(path)
    if checkpoint.format == "gguf":
        file = GGUFFile.open(path)
        tokenizer, source = Tokenizer.from_gguf(file), _gguf_template(file)
    else:
        tokenizer, source = Tokenizer.from_directory(path), _directory_template(path)
    return TextSide(
        tokenizer=tokenizer,
        template=ChatTemplate(source, tokenizer.special_tokens) if source else None,
        generation=GenerationDefaults.of(checkpoint.generation_config),
        stop_token_ids=_stop_token_ids(checkpoint, tokenizer, source or ""),
        vocab_size=checkpoint.config.get("vocab_size") or tokenizer.vocab_size,
    )


def _stop_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """Return the ids by the rule above, each once, in that order."""
    declared = checkpoint.generation_config.get("eos_token_id")
    if declared is None:
        declared = checkpoint.config.get("eos_token_id")
    ids = declared if isinstance(declared, list) else [declared]
    named = [tokenizer.special_tokens.get("eos_token", "")]
    named += [token for token in TURN_ENDS if token in template]
    control = (tokenizer.id_of(token) for token in named)
    candidates = [*ids, *(i for i in control if i in tokenizer.control_ids)]
    return tuple(dict.fromkeys(i for i in candidates if isinstance(i, int)))


def _gguf_template(file: GGUFFile) -> str | None:
    source = file.metadata.get("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{file.path}: tokenizer.chat_template is no string")
    return source


def _directory_template(path: Path) -> str | None:
    """Return chat_template.jinja, else the template in tokenizer_config.json, its default one."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise CheckpointError(f"{file}: cannot be read: {exc}") from exc
    config_path = path / "tokenizer_config.json"
    source = read_object(config_path).get("chat_template") if config_path.exists() else None
    if isinstance(source, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{config_path}: chat_template is no string")
    return source
