"""Requests are read strictly: what is accepted is honoured, what is not is named."""

import msgspec
import pytest

from cortex.ipc import openai
from cortex.ipc.errors import (
    InvalidRequest,
    MalformedJson,
    MissingModelField,
    UnsupportedParameter,
)

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def chat(**more: object) -> openai.ChatCompletionRequest:
    body = msgspec.json.encode({**HELLO, **more})
    return openai.decode_request(body, openai.ChatCompletionRequest)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"a": }'])
def test_a_body_that_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedJson):
        openai.decode_request(body, openai.ChatCompletionRequest)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object_is_invalid(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="object"):
        openai.decode_request(body, openai.ChatCompletionRequest)


@pytest.mark.parametrize("model", [None, 3, ""])
def test_a_body_without_a_model_says_so(model: object) -> None:
    with pytest.raises(MissingModelField) as refusal:
        chat(model=model)

    assert refusal.value.param == "model"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("n", 2),
        ("logprobs", True),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
        ("min_p", 0.1),
    ],
)
def test_a_known_parameter_that_is_not_honoured_is_refused_by_name(
    name: str, value: object
) -> None:
    with pytest.raises(UnsupportedParameter, match=name) as refusal:
        chat(**{name: value})

    assert refusal.value.param == name


def test_one_is_not_the_same_as_true() -> None:
    with pytest.raises(UnsupportedParameter):
        chat(logprobs=0)


def test_a_parameter_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameter, match="temprature"):
        chat(temprature=0.5)


@pytest.mark.parametrize("name", sorted(openai.PARAMETERS.neutral))
def test_a_neutral_value_asks_for_nothing(name: str) -> None:
    for value in openai.PARAMETERS.neutral[name]:
        chat(**{name: value})


@pytest.mark.parametrize("name", sorted(openai.PARAMETERS.without_effect))
def test_a_parameter_without_effect_is_accepted(name: str) -> None:
    chat(**{name: "anything"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 1.5),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("stop", 5),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "hello"),
        ("stream_options", 3),
    ],
)
def test_a_value_of_the_wrong_type_or_size_names_its_place(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        chat(**{name: value})

    assert refusal.value.param is not None
    assert refusal.value.param.startswith(name)


def test_a_place_inside_a_list_is_named() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        chat(messages=[{"role": "user"}, {"content": "who?"}])

    assert refusal.value.param == "messages[1]"


def test_a_replayed_tool_turn_with_null_content_is_a_message() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}

    assert chat(messages=[turn]).messages[0].content is None


def test_the_newer_name_of_the_limit_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=3).limit_tokens == 3
    assert chat(max_tokens=5).limit_tokens == 5
    assert chat().limit_tokens is None


def test_one_stop_string_or_several() -> None:
    assert chat(stop="a").stop_strings == ["a"]
    assert chat(stop=["a", "", "b"]).stop_strings == ["a", "b"]
    assert chat(stop=None).stop_strings == []


def test_a_usage_chunk_comes_only_when_asked() -> None:
    assert not chat(stream=True).wants_usage_chunk
    assert chat(stream=True, stream_options={"include_usage": True}).wants_usage_chunk


@pytest.mark.parametrize(
    ("prompt", "read_as"), [("text", "text"), ([1, 2], [1, 2]), (["text"], "text"), ([], [])]
)
def test_a_prompt_is_text_or_token_ids(prompt: object, read_as: object) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": prompt})

    assert openai.decode_request(body, openai.CompletionRequest).prompt == read_as


@pytest.mark.parametrize("prompt", [["a", "b"], [-1], [2**31], [[1]], None, 5, [1, "a"]])
def test_any_other_prompt_is_refused(prompt: object) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": prompt})

    with pytest.raises(InvalidRequest):
        openai.decode_request(body, openai.CompletionRequest)


def test_a_chunk_without_usage_leaves_the_field_out() -> None:
    chunk = openai.ChatCompletionChunk(id="c", created=1, model="m", choices=[])

    assert b"usage" not in msgspec.json.encode(chunk)
