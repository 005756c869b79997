"""From a request to the tokens of its prompt; all of it blocks, so it runs in few threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from cortex.ipc.errors import InvalidRequest
from cortex.ipc.openai import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    TokenizeRequest,
)
from cortex.ipc.tools import NamedTool
from cortex.runtime.answer_grammar import of_text
from cortex.runtime.conversation import CallDemand, ChatPrompt, Conversation
from cortex.runtime.echo import echo_of
from cortex.runtime.grammar_check import Part
from cortex.runtime.node import TextView
from cortex.runtime.pieces import PlainReader
from cortex.runtime.reasoning import wish_of
from cortex.runtime.sampling import refuse_unknown_tokens
from cortex.runtime.structured import demand_of
from cortex.runtime.tool_grammars import OfferedTool

T = TypeVar("T")

TEXT_THREADS = 4


class TextThreads:
    """A bounded thread pool for text sides: long prompts take them seconds."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "text")

    async def run(self, work: Callable[[], T]) -> T:
        """Return what *work* returns, which blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Give up the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def prompts_of(
    text: TextView, asked: ChatCompletionRequest | CompletionRequest
) -> list[ChatPrompt]:
    """Return the prompts, and how the answers to them are read; raise ApiError in words."""
    if isinstance(asked, ChatCompletionRequest):
        conversation = replace(
            _conversation(asked, asked.messages),
            text_demand=demand_of(asked),
            call_demand=calls_demanded(asked),
        )
        return [text.chat_prompt(conversation)]
    demand = demand_of(asked)
    whole = [Part(of_text(demand), demand.place)] if demand else []
    prompts = [
        _completion(text, asked, prompt, f"prompt[{index}]" if index else "prompt")
        for index, prompt in enumerate(asked.prompts)
    ]
    return [
        replace(prompt, grammar=whole[0].grammar if whole else None, grammar_parts=whole)
        for prompt in prompts
    ]


def tokenized(text: TextView, asked: TokenizeRequest) -> list[int]:
    """Return the tokens of what a chat or a completion would be asked with; raise ApiError."""
    if asked.prompt is not None:
        return tokens_of(text, asked.prompt, "prompt")
    assert asked.messages is not None, "what has no prompt has messages"
    return text.chat_prompt(_conversation(asked, asked.messages)).token_ids


def _conversation(
    asked: ChatCompletionRequest | TokenizeRequest, messages: Sequence[ChatMessage]
) -> Conversation:
    return Conversation(
        messages,
        tools=asked.offered_tools,
        reasoning=wish_of(asked.reasoning_effort, asked.thinking),
        template_kwargs=asked.chat_template_kwargs or {},
        add_generation_prompt=asked.asks_for_turn,
        continues_last=bool(asked.continue_final_message),
    )


def _completion(
    text: TextView, asked: CompletionRequest, prompt: str | list[int], place: str
) -> ChatPrompt:
    if asked.suffix:
        if not isinstance(prompt, str):
            raise InvalidRequest("'suffix' needs a prompt of text, not of token ids", param=place)
        return text.fill_prompt(prompt, asked.suffix)
    token_ids = tokens_of(text, prompt, place)
    echo = echo_of(prompt, token_ids, text.token_bytes) if asked.echo else None
    return ChatPrompt(token_ids, PlainReader, echo=echo)


def calls_demanded(asked: ChatCompletionRequest) -> CallDemand:
    """Return what *asked* says of calls; only a named tool is called once."""
    choice = asked.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    is_forced = asked.demands_call
    functions = [(i, tool["function"]) for i, tool in enumerate(asked.offered_tools)]
    return CallDemand(
        tools=[
            OfferedTool(
                function["name"],
                function.get("parameters"),
                place=f"tools[{index}].function.parameters",
                is_enforced=is_forced or bool(function.get("strict")),
            )
            for index, function in functions
            if named in (None, function["name"])
        ],
        is_forced=is_forced,
        is_many=named is None and asked.parallel_tool_calls is not False,
    )


def tokens_of(text: TextView, prompt: str | Sequence[int | str], place: str) -> list[int]:
    """Return the tokens of a text, or token ids as they are.

    Raise InvalidRequest, naming *place*, for an empty prompt and for ids that the model has not.
    """
    if isinstance(prompt, str):
        token_ids = text.text_prompt(prompt)
    else:
        token_ids = [token for token in prompt if isinstance(token, int)]  # all are, by now
    if not token_ids:
        raise InvalidRequest("the prompt is empty", param=place)
    refuse_unknown_tokens(token_ids, text.vocab_size, place)
    return token_ids
