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
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cortex.ipc.errors import Unloadable, UnsupportedParameter
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.json import read_bytes, read_object
from cortex.runtime.answer_grammar import of_text
from cortex.runtime.chat import Chat, ChatOptions, encoded
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.conversation import ChatPrompt, Conversation
from cortex.runtime.detokenizer import Detokenizer
from cortex.runtime.fill_in_middle import ends_of, marks_of
from cortex.runtime.grammar_check import Part
from cortex.runtime.pieces import PlainReader
from cortex.runtime.tokenizer import Tokenizer
from cortex.runtime.tokenizer_cache import TokenizerCache

MAX_TEMPLATE_BYTES = 1 << 20

TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling that the checkpoint recommends; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> GenerationDefaults:
        """Read generation_config.json; ``do_sample: false`` there means greedy.

        Raise CheckpointError for values that no request could ask for either.
        """
        temperature = _number(config, "temperature", 0.0, 2.0)
        if config.get("do_sample") is False:
            temperature = 0.0
        top_k = _number(config, "top_k", 0, 2**31 - 1)
        return cls(
            temperature,
            top_p=_number(config, "top_p", sys.float_info.min, 1.0),
            top_k=None if top_k is None else int(top_k),
            min_p=_number(config, "min_p", 0.0, 1.0),
            repetition_penalty=_number(config, "repetition_penalty", 0.01, 2.0),
        )


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
    chat: Chat | None
    """None where the checkpoint has no chat template."""
    generation: GenerationDefaults
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    """Of the weights, which may have rows that no token of the tokenizer uses."""
    pooling: Literal["last", "mean"] | None = None
    """How the checkpoint makes one vector of a text; None where it does not."""

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        options: ChatOptions | None = None,
        tokenizers: TokenizerCache | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> TextSide:
        """Read the text side of a GGUF file or a directory; raise Unloadable.

        *checkpoint* is it, opened, where the caller has it.
        """
        try:
            opened = checkpoint or Checkpoint.open(path)
            return _read(opened, options, tokenizers or TokenizerCache())
        except CheckpointError as exc:
            raise Unloadable(str(exc), kind="corrupt_checkpoint") from exc

    @property
    def abilities(self) -> list[str]:
        """What requests can ask of the model, as ``/models`` names it."""
        has = {
            "completion": True,
            "chat": self.chat is not None,
            "tools": self.takes_tools,
            "embeddings": self.pooling is not None,
        }
        return [name for name, is_there in has.items() if is_there]

    @property
    def takes_tools(self) -> bool:
        """Whether a conversation may offer tools."""
        return self.chat is not None and self.chat.takes_tools

    @property
    def reasons(self) -> bool:
        """Whether the model may think before it answers."""
        return self.chat is not None and self.chat.reasons

    @property
    def takes_effort(self) -> bool:
        """Whether its template has a word for how much it should think."""
        return self.chat is not None and self.chat.takes_effort

    def chat_prompt(self, conversation: Conversation) -> ChatPrompt:
        """Return the prompt of a conversation; raise InvalidRequest or UnsupportedParameter."""
        if self.chat is None:
            raise UnsupportedParameter(
                "this model has no chat template, so it cannot chat: use /v1/completions",
                param="messages",
            )
        prompt = self.chat.prompt(conversation)
        if prompt.grammar is None:
            return prompt
        return replace(prompt, grammar_parts=_parts(prompt.grammar, conversation))

    @property
    def control_tokens(self) -> dict[int, bytes]:
        """The tokens that are no text, by their ids."""
        return {i: self.tokenizer.bytes_of(i) for i in sorted(self.tokenizer.control_ids)}

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for."""
        return self.tokenizer.bytes_of(token_id)

    def text_prompt(self, prompt: str) -> list[int]:
        """Return the ids of a plain text, with BOS where the tokenizer wants one."""
        return encoded(self.tokenizer, prompt, "prompt", with_bos=True)

    def fill_prompt(self, before: str, after: str) -> ChatPrompt:
        """Return the prompt whose answer belongs between *before* and *after*.

        Raise UnsupportedParameter where the tokeniser has no tokens for that.
        """
        markers = self.tokenizer.markers
        marks = marks_of(markers, self.tokenizer.fill_tokens)
        if marks is None:
            raise UnsupportedParameter(
                "this model cannot fill in before a suffix: its tokeniser has no tokens for it",
                param="suffix",
            )
        ends = (self.tokenizer.id_of(token) for token in ends_of(marks, markers))
        return ChatPrompt(
            self.text_prompt(marks.around(before, after)),
            PlainReader,
            end_ids=tuple(i for i in ends if i is not None),
        )

    def detokenizer(self, shown_ids: Collection[int] = ()) -> Detokenizer:
        """Return a detokenizer for one answer; what ends a sequence is not shown.

        *shown_ids* are control tokens that are shown nevertheless.
        """
        return Detokenizer(self.tokenizer, self.stop_token_ids, shown_ids)


def _parts(grammar: str, conversation: Conversation) -> list[Part]:
    """Return the demands in *grammar* alone, so that a bad one can be named, and then the whole."""
    demand, calls = conversation.text_demand, conversation.call_demand
    demands = [demand] if demand else []
    demands += [tool.demand for tool in calls.tools if tool.is_enforced]
    parts = [Part(of_text(it), it.place) for it in demands]
    return [*parts, Part(grammar, demand.place if demand else "tools")]


def _read(
    checkpoint: Checkpoint, options: ChatOptions | None, tokenizers: TokenizerCache
) -> TextSide:
    path = checkpoint.path
    if checkpoint.gguf is not None:
        file = checkpoint.gguf
        tokenizer = tokenizers.of([path], lambda: Tokenizer.from_gguf(file))
        source = _gguf_template(file)
    else:
        files = [path / "tokenizer.json", path / "tokenizer_config.json"]
        tokenizer = tokenizers.of(files, lambda: Tokenizer.from_directory(path))
        source = _directory_template(path)
    return TextSide(
        tokenizer=tokenizer,
        chat=_chat(tokenizer, source, options) if source else None,
        generation=GenerationDefaults.of(checkpoint.generation_config),
        stop_token_ids=_stop_token_ids(checkpoint, tokenizer, source or ""),
        vocab_size=checkpoint.config.get("vocab_size") or tokenizer.vocab_size,
        pooling=checkpoint.pooling,
    )


def _chat(tokenizer: Tokenizer, template: str, options: ChatOptions | None) -> Chat:
    return Chat(tokenizer, ChatTemplate(template, tokenizer.special_tokens), options)


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
            return read_bytes(file, MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{file}: cannot be read: {exc}") from exc
    config_path = path / "tokenizer_config.json"
    source = read_object(config_path).get("chat_template") if config_path.exists() else None
    if isinstance(source, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{config_path}: chat_template is no string")
    return source
