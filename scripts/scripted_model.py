"""A model whose answers are written down: for clients whose prompts, or wit, a small model lacks.

Everything around it is real: the engine, its paged cache and prefix cache, the sampler, grammars,
the tokeniser and the chat template of the checkpoint whose place it takes; only the logits are made
up. They prefer the next token of what ``script`` says to the prompt, as the paged cache holds it,
so that a grammar may still overrule them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cortex.models.batch import Batch, CacheShape, KVCache
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.runtime.device import main as device_main
from cortex.runtime.tokenizer import Tokenizer

CONTEXT_TOKENS = 131_072
KEPT_ANSWERS = 64
ANSWER = "<|im_start|>assistant\n"
"""Behind the last of these stands what has been answered so far."""
END = "<|im_end|>"
SHORT = ("[", "{", ",", "]", "}", '"')
"""What comes to an end soon where a grammar wants what is not written down, the best last."""
TOOL_LINE = re.compile(r"^\{.*\}$", re.MULTILINE)
ARGUMENTS = {
    "cmd": "echo cortex was here",
    "command": "echo cortex was here",
    "description": "Say that it works",
    "location": "San Francisco",
    "city": "Paris",
    "path": "README.md",
}
"""What calls say in the parameters that a tool requires."""
PREFERRED = ("Bash", "bash", "exec_command", "shell", "shell_command", "get_weather")
THINK = re.compile("Let me think|Show your reasoning")
"""A turn with these words is answered with reasoning first."""
THOUGHT = "</think>"
EVERY = "each of your tools"
"""A turn with these words gets a call of every tool that is offered."""


def script(prompt: str) -> str:
    """Return the answer to *prompt*, a conversation as the chat template wrote it.

    The result of a tool is repeated; a tool that is offered is called; anything else is greeted.
    """
    last = prompt.removesuffix(ANSWER).rpartition("<|im_start|>")[2]
    if results := re.findall(r"<tool_response>\n?(.*?)\n?</tool_response>", last, re.DOTALL):
        return f"The tool said: {results[-1].strip().splitlines()[-1]}"
    offered = list(tools_in(prompt))
    if called := offered if EVERY in last else preferred(offered):
        return "\n".join(map(call_of, called))
    thought = f"<think>\nThey want to be greeted.\n{THOUGHT}\n" if THINK.search(last) else ""
    return f"{thought}Hello there, friend!"


def call_of(tool: dict[str, Any]) -> str:
    """Return a call of *tool* in the model's own format."""
    call = {"name": tool["name"], "arguments": arguments_of(tool)}
    return f"<tool_call>\n{json.dumps(call, separators=(',', ':'))}\n</tool_call>"


def tools_in(prompt: str) -> Iterator[dict[str, Any]]:
    """Yield the functions that the system turn offers."""
    offered = re.search(r"<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
    for line in TOOL_LINE.findall(offered[1]) if offered else ():
        yield json.loads(line)["function"]


def preferred(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tool to call: a shell where there is one, else one that is alone."""
    named = {tool["name"]: tool for tool in tools}
    known = [named[name] for name in PREFERRED if name in named]
    return known[:1] or (tools if len(tools) == 1 else [])


def arguments_of(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a value for each parameter that *tool* requires."""
    schema = tool.get("parameters") or {}
    properties = schema.get("properties", {})
    return {name: _value(name, properties.get(name, {})) for name in schema.get("required", ())}


def _value(name: str, schema: dict[str, Any]) -> Any:
    said = ARGUMENTS.get(name, "something")
    match schema.get("type"):
        case "array":
            return ["bash", "-lc", said]
        case "integer" | "number":
            return 1
        case "boolean":
            return False
        case _:
            return said


class ScriptedModule(nn.Module):
    """Writes tokens into the cache's keys, and reads whole conversations out of it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._opening = tokenizer.encode(ANSWER)
        self._short = [tokenizer.encode(text)[0] for text in SHORT]
        self._end = tokenizer.encode(END)[0]
        self._answers: dict[tuple[int, ...], str] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Return logits [R, V] of the sampled rows."""
        batch.cache.keys[0].view(-1)[batch.slots] = batch.token_ids.float()
        return torch.stack([self._row(self._tokens(batch, at)) for at in batch.sampled.tolist()])

    def hidden(self, batch: Batch) -> Tensor:
        """Refuse: nobody asks a script for embeddings."""
        raise NotImplementedError(batch)

    def _tokens(self, batch: Batch, index: int) -> list[int]:
        """Return the sequence of a token of the batch, up to that token."""
        sequence = int((batch.query_starts <= index).sum()) - 1
        size = batch.cache.block_tokens
        at = torch.arange(int(batch.positions[index]) + 1)
        slots = batch.block_tables[sequence, at // size] * size + at % size
        found: list[int] = batch.cache.keys[0].view(-1)[slots].long().tolist()
        return found

    def _row(self, tokens: list[int]) -> Tensor:
        start = _behind_last(tokens, self._opening)
        row = torch.zeros(self._vocab_size)
        row[self._short] = torch.arange(1.0, len(SHORT) + 1)
        row[self._end] = 8.0
        said = self._text(tokens[start:])  # by text: a grammar may cut it otherwise
        left = left_of(self._answer(tokens[:start]), said)
        for text, logit in ((left.lstrip(), 15.0), (left, 16.0)):
            if text:
                row[self._tokenizer.encode(text)[0]] = logit
        return row

    def _text(self, tokens: list[int]) -> str:
        """Return *tokens* as text, the special ones too."""
        return b"".join(map(self._tokenizer.bytes_of, tokens)).decode(errors="replace")

    def _answer(self, prompt: list[int]) -> str:
        key = tuple(prompt)
        if key not in self._answers:
            if len(self._answers) >= KEPT_ANSWERS:
                self._answers.clear()
            self._answers[key] = script(self._text(prompt))
        return self._answers[key]


def left_of(answer: str, said: str) -> str:
    """Return what of *answer* is still to say; nothing where something else has been said.

    White space does not count: a grammar may have its own. Nor does how much was thought: that may
    have a bound.
    """
    if THOUGHT in said:
        answer, said = (text.rpartition(THOUGHT)[2] for text in (answer, said))
    at = 0
    for character in "".join(said.split()):
        at += len(answer[at:]) - len(answer[at:].lstrip())
        if answer[at : at + 1] != character:
            return ""
        at += 1
    left = answer[at:]
    return left.lstrip() if said[-1:].isspace() else left


def _behind_last(tokens: list[int], wanted: list[int]) -> int:
    """Return where *wanted* ends for the last time; the length of *tokens* where it is nowhere."""
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start : start + len(wanted)] == wanted:
            return start + len(wanted)
    return len(tokens)


ONE_LAYER = CacheShape(layers=1, kv_heads=1, head_dim=1)


@dataclass
class ScriptedModel:
    """A loaded model of one layer with a cache of 8 bytes a token."""

    module: ScriptedModule
    vocab_size: int
    caches: CacheShape = ONE_LAYER
    kv_dtype: torch.dtype = torch.float32
    max_position_embeddings: int = CONTEXT_TOKENS
    weights_bytes: int = 1000

    def new_cache(self, blocks: int, block_tokens: int, state_slots: int = 0) -> KVCache:
        """Return an empty cache."""
        del state_slots
        keys, values = (torch.zeros(blocks, block_tokens, 1, 1) for _ in range(2))
        return KVCache(keys=[keys], values=[values], block_tokens=block_tokens)

    def recorded(self, cache: KVCache, max_sequences: int) -> Callable[[Batch], Tensor]:
        """Return the module: nothing is gained by recording it."""
        del cache, max_sequences
        return self.module


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: str,
    on_progress: Callable[[int, int], None],
    **rest: object,
) -> ScriptedModel:
    """Return a scripted model in place of the GGUF at *path*."""
    del device, dtype, rest
    on_progress(1, 1)
    tokenizer = Tokenizer.from_gguf(GGUFFile.open(path))
    return ScriptedModel(ScriptedModule(tokenizer, tokenizer.vocab_size), tokenizer.vocab_size)


def run(**named: Any) -> None:
    """Be a device process."""
    setattr(device_main, "load_model", load_model)  # noqa: B010 - the one double here
    device_main.main(**named)
