"""Qwen3's own tokenizer and chat template, as they were published, against transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
import transformers

import published
from cortex.ipc.openai import ChatMessage
from cortex.ipc.tools import FunctionCall, ToolCall
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.runtime.chat import Chat
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.conversation import Conversation, ReasoningWish
from cortex.runtime.detokenizer import Detokenizer
from cortex.runtime.pieces import CallArguments, CallBegins, Reasoning, Text
from cortex.runtime.tokenizer import Tokenizer
from tiny_text import TINY_LLAMA, write_gguf

TEXTS = [
    "def add(left: int, right: int = 0x1F) -> int:\n\treturn left+right  # sum\r\n\n\n",
    '{"key": [1, 2.50, -3e10, null], "naïve": "\\u00e9"}',
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 😀😀 ☃️",
    "日本語の文章です。カタカナもあります。中文也有。한국어도 있습니다.",
    "שָׁלוֹם עולם، مرحبا بالعالم ١٢٣ سلام دنیا",
    "Ångström e\u0301 ﬁ ½ ① Ⅷ",
    "  leading, trailing  \n\n \t ",
    "1234567890 3.14159 1,000,000",
    "I'LL don't WE'VE",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think><tool_call>x</tool_call><|endoftext|>",
    "<|im_start <think <tool_call",
    "\x00\x07\ufeff\u200b\u2028",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = ToolCall("call_1", FunctionCall("add", '{"a": 1}'))
CONVERSATION = [
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "One and one?"),
    ChatMessage("assistant", tool_calls=[CALL], reasoning_content="I add."),
    ChatMessage("tool", "2", tool_call_id="call_1"),
]


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.AutoTokenizer.from_pretrained(published.qwen3_tokenizer())


@pytest.fixture(scope="module")
def from_directory() -> Tokenizer:
    return Tokenizer.from_directory(published.qwen3_tokenizer())


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same tokenizer as a converter would put it into a GGUF file."""
    files = published.qwen3_tokenizer()
    model = json.loads((files / "tokenizer.json").read_text())["model"]
    backend = tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))
    added = backend.get_added_tokens_decoder()
    kinds = {i: 3 if token.special else 4 for i, token in added.items()}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [backend.id_to_token(i) for i in range(backend.get_vocab_size())],
        "token_type": [kinds.get(i, 1) for i in range(backend.get_vocab_size())],
        "merges": merges,
        "eos_token_id": backend.token_to_id("<|im_end|>"),
    }
    path = tmp_path_factory.mktemp("gguf") / "qwen3.gguf"
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return Tokenizer.from_gguf(GGUFFile.open(write_gguf(path, TINY_LLAMA | keys)))


@pytest.fixture(scope="module")
def chat(from_directory: Tokenizer) -> Chat:
    config = json.loads((published.qwen3_tokenizer() / "tokenizer_config.json").read_text())
    return Chat(
        from_directory, ChatTemplate(config["chat_template"], from_directory.special_tokens)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_a_directorys_tokens_are_the_references(
    text: str, reference: Any, from_directory: Tokenizer
) -> None:
    ids = from_directory.encode(text, with_bos=True)

    assert ids == reference(text)["input_ids"]
    assert from_directory.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_a_gguf_files_tokens_are_the_references(
    text: str, reference: Any, from_gguf: Tokenizer
) -> None:
    assert from_gguf.encode(text, with_bos=True) == reference(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_that_arrive_one_by_one_become_the_same_text(
    text: str, from_directory: Tokenizer
) -> None:
    detokenizer = Detokenizer(from_directory)
    ids = from_directory.encode(text)

    shown = "".join(detokenizer.add([i]) for i in ids) + detokenizer.flush()

    assert shown == from_directory.decode(ids)


@pytest.mark.parametrize("is_enabled", [None, True, False])
@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_prompts_with_tools_and_thinking_are_the_references(
    is_enabled: bool | None, tools: list[dict[str, Any]], chat: Chat, reference: Any
) -> None:
    switch = {} if is_enabled is None else {"enable_thinking": is_enabled}
    function = {"name": "add", "arguments": {"a": 1}}
    messages = [{"role": m.role, "content": m.content or ""} for m in CONVERSATION]
    messages[2] |= {
        "reasoning_content": "I add.",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }

    prompt = chat.prompt(Conversation(CONVERSATION, tools, ReasoningWish(is_enabled)))

    expected = reference.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, **switch
    )
    assert prompt.token_ids == expected["input_ids"]


def test_it_reasons_takes_tools_and_knows_no_effort(chat: Chat) -> None:
    assert (chat.reasons, chat.takes_tools, chat.takes_effort) == (True, True, False)


def test_a_budget_names_the_marks_own_tokens(chat: Chat, from_directory: Tokenizer) -> None:
    wish = ReasoningWish(is_enabled=True, effort="low")

    budget = chat.prompt(Conversation(CONVERSATION, reasoning=wish)).reasoning_budget

    assert budget is not None
    assert budget.max_tokens == 1024
    assert budget.start_token_ids == (from_directory.id_of("<think>"),)
    assert budget.end_token_ids == (from_directory.id_of("</think>"),)


def test_an_answer_is_read_from_its_tokens(chat: Chat, from_directory: Tokenizer) -> None:
    said = (
        "<think>\nI add.\n</think>\n\nSure.\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    prompt = chat.prompt(Conversation(CONVERSATION, [TOOL]))
    detokenizer = Detokenizer(from_directory, shown_ids=prompt.shown_ids)
    reader = prompt.reader()

    pieces = [p for i in from_directory.encode(said) for p in reader.add(detokenizer.add([i]))]
    pieces += reader.add(detokenizer.flush()) + reader.flush(ended=True)

    assert "".join(p.text for p in pieces if isinstance(p, Reasoning)) == "I add."
    assert "".join(p.text for p in pieces if isinstance(p, Text)) == "Sure."
    assert [p.name for p in pieces if isinstance(p, CallBegins)] == ["add"]
    assert "".join(p.text for p in pieces if isinstance(p, CallArguments)) == '{"a": 1}'
