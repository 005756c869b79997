"""The chunks of a stream: most are text in an envelope, and read as if they were written whole."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from cortex.ipc.openai_answers import (
    ChatCompletionChunk,
    ChunkChoice,
    Completion,
    Delta,
    TextChoice,
)
from cortex.runtime.completions import ChatAnswers, TextAnswers
from cortex.runtime.pieces import Text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
MODELS = ['"content":""', '"text":""', "org/name", 'a\\"b']


@pytest.mark.parametrize("is_nullable", [True, False])
@pytest.mark.parametrize("model", MODELS)
@given(text=TEXTS, index=st.integers(0, 3))
def test_a_chat_chunk_with_text_is_the_bytes_of_its_object(
    model: str, is_nullable: bool, text: str, index: int
) -> None:
    answers = ChatAnswers(model, is_nullable)

    sent = msgspec.json.encode(answers.piece(index, Text(text), None))

    usage = None if is_nullable else UNSET
    choice = ChunkChoice(Delta(content=text), index=index)
    chunk = ChatCompletionChunk(answers.id, answers.created, model, [choice], usage=usage)
    assert sent == msgspec.json.encode(chunk)


@pytest.mark.parametrize("is_nullable", [True, False])
@pytest.mark.parametrize("model", MODELS)
@given(text=TEXTS, index=st.integers(0, 3))
def test_a_text_chunk_is_the_bytes_of_its_object(
    model: str, is_nullable: bool, text: str, index: int
) -> None:
    answers = TextAnswers(model, is_nullable)

    sent = msgspec.json.encode(answers.piece(index, Text(text), None))

    usage = None if is_nullable else UNSET
    choice = TextChoice(text, index=index)
    chunk = Completion(answers.id, answers.created, model, [choice], usage=usage)
    assert sent == msgspec.json.encode(chunk)
