"""Small chat templates, and what the real ``Chat`` makes of conversations by them."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import AddedToken

from cortex.ipc.openai import ChatMessage
from cortex.ipc.tools import FunctionCall, ToolCall
from cortex.runtime.chat import Chat, ChatOptions
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.conversation import ChatPrompt, Conversation
from cortex.runtime.tokenizer import Tokenizer
from tiny_text import trained

PLAIN = """\
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"""

TOOLS_AND_THOUGHT = """\
{%- for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for m in messages %}[{{ m.role }}]
    {%- if m.content %}{{ m.content }}{% endif %}
    {%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}[assistant]
{%- if thinking is defined and thinking %}<think>{% endif %}
{%- if thinking is defined and not thinking %}<think></think>{% endif %}"""

UNREAD_CALLS = TOOLS_AND_THOUGHT.replace("<tool_call>", "<<").replace("</tool_call>", ">>")
EFFORTS = PLAIN + "{{ reasoning_effort }}{# 'low' 'high' #}[THINK][/THINK]"
OPENED = PLAIN + "<think>\n{# </think> #}"
ALWAYS = PLAIN + "{# <think></think> #}"

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
ASK = ChatMessage("user", "One and one?")
CALLED = [
    ChatMessage("assistant", tool_calls=[ToolCall("c1", FunctionCall("add", '{"a": 1}'))]),
    ChatMessage("tool", "2", tool_call_id="c1"),
]


@functools.cache
def tokenizer() -> Tokenizer:
    """The tiny tokenizer with control tokens for some marks."""
    backend = trained("smollm")
    control = ["[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</think>"]
    backend.add_special_tokens([AddedToken(word, special=True) for word in control])
    return Tokenizer(backend, {})


def chat(template: str, **options: Any) -> Chat:
    return Chat(tokenizer(), ChatTemplate(template, {}), ChatOptions(**options))


def prompt_of(chat: Chat, *messages: ChatMessage, **more: Any) -> ChatPrompt:
    return chat.prompt(Conversation(messages or [ASK], **more))


def text_of(prompt: ChatPrompt) -> str:
    side = tokenizer()
    return b"".join(side.bytes_of(i) for i in prompt.token_ids).decode()


def ids(*words: str) -> set[int | None]:
    return {tokenizer().id_of(word) for word in words}
