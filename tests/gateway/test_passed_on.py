"""What the gateway reads of a body that it passes on, and the little that it changes."""

import math
from typing import Any

import orjson
import pytest

from cortex.gateway.affinity import head_of
from cortex.gateway.dialects.chat import PassedOn
from cortex.ipc.errors import ApiError, InvalidRequest, MalformedJson
from cortex.ipc.requests import MAX_COMMAS

CHAT = "/v1/chat/completions"
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
]


def of(**fields: Any) -> PassedOn:
    return PassedOn.of(CHAT, orjson.dumps({"model": "m", **fields}))


def test_a_body_goes_on_byte_for_byte() -> None:
    raw = b' {"model":"m" , "messages":[ ],"temperature":1.0} '

    assert PassedOn.of(CHAT, raw).body("m") is raw


def test_another_name_of_the_model_is_all_that_changes() -> None:
    assert orjson.loads(of(messages=TURNS, n=2).body("file:/m")) == {
        "model": "file:/m",
        "messages": TURNS,
        "n": 2,
    }


@pytest.mark.parametrize("keep_alive", ["5m", 0, None])
def test_keep_alive_stays_here(keep_alive: Any) -> None:
    body = orjson.loads(of(messages=TURNS, keep_alive=keep_alive).body("m"))

    assert body == {"model": "m", "messages": TURNS}


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        (None, None),
        (0, 0.0),
        ("0", 0.0),
        (90, 90.0),
        (1.5, 1.5),
        ("90", 90.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("1m2s", 62.0),
        (-1, math.inf),
        ("-1", math.inf),
        ("-1m", math.inf),
        (10**15, math.inf),
    ],
)
def test_keep_alive_says_how_long_a_model_stays(keep_alive: Any, seconds: float | None) -> None:
    assert of(keep_alive=keep_alive).stay_seconds == seconds


def test_without_keep_alive_nothing_is_said() -> None:
    assert of().stay_seconds is None


@pytest.mark.parametrize(
    "keep_alive", [True, "", "soon", "5 m", "m5", "1h30", "5d", [5], {}, "--1"]
)
def test_a_bad_keep_alive_is_named(keep_alive: Any) -> None:
    with pytest.raises(InvalidRequest, match="keep_alive must be") as refused:
        of(keep_alive=keep_alive)

    assert refused.value.param == "keep_alive"


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 9}, 9),
        ({"max_completion_tokens": 8, "max_tokens": 9}, 8),
        ({"max_completion_tokens": None, "max_tokens": 9}, 9),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": 9, "n": 3}, 27),
        ({"max_tokens": 9, "n": None}, 9),
        ({"max_tokens": "9"}, None),
        ({"max_tokens": True}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 9, "prompt": "[["}, 9),
        ({"max_tokens": 9, "prompt": []}, 9),
        ({"max_tokens": 9, "prompt": [1, 2, 3]}, 9),
        ({"max_tokens": 9, "prompt": ["a", "b, c"]}, 18),
        ({"max_tokens": 9, "prompt": [[1, 2], [3], [4]], "n": 2}, 54),
    ],
)
def test_the_limit_of_all_its_choices(fields: dict[str, Any], limit: int | None) -> None:
    assert of(**fields).output_limit == limit


def test_a_conversation_is_known_by_its_head() -> None:
    first, later = of(messages=TURNS[:2]), of(messages=[*TURNS, {"role": "user", "content": "?"}])

    assert first.affinity == later.affinity == head_of(TURNS)


def test_a_name_in_the_body_comes_before_the_head() -> None:
    assert of(messages=TURNS, prompt_cache_key="pc").affinity == "pc"
    assert of(messages=TURNS, metadata={"user_id": "user_1_session_2"}).affinity == "2"


def test_a_prompt_without_turns_is_known_by_how_it_begins() -> None:
    prompt = "def f():\n" * 300

    assert of(prompt=prompt).affinity == of(prompt=prompt + "    return").affinity
    assert of(prompt=prompt).affinity != of(prompt="x" + prompt).affinity
    assert of(prompt=[1, 2]).affinity != of(prompt=[1, 3]).affinity


def test_an_embedding_has_no_session() -> None:
    assert of(input=["a", "b"]).affinity is None


@pytest.mark.parametrize("messages", [None, 7, "hi", {}, [None, 1], [[]]])
def test_turns_that_are_none_are_the_nodes_to_refuse(messages: Any) -> None:
    call = of(messages=messages)

    assert orjson.loads(call.body("m"))["messages"] == messages


def test_of_more_turns_than_anybody_has_none_is_cut_out() -> None:
    turns = b"[" + b"0," * (MAX_COMMAS + 1) + b"0]"

    assert PassedOn.of(CHAT, b'{"model":"m","messages":' + turns + b"}").affinity is None


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"model":"\xff"}', b"[" * 100_000])
def test_what_is_no_object_is_refused_in_our_words(raw: bytes) -> None:
    with pytest.raises(ApiError, match="the body") as refused:
        PassedOn.of(CHAT, raw)

    assert isinstance(refused.value, MalformedJson | InvalidRequest)
