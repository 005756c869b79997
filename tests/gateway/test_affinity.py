"""Which session a request belongs to, and where it is at home."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from cortex.gateway.affinity import Session, head_of, named_in_body, session_of

NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)
SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}
ANSWER, NEXT = {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}


def key_of(key_id: str | None, affinity: str | None, **headers: str) -> str | None:
    sent = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    session = session_of(key_id, sent, affinity, 1.25)
    return session.key if session else None


def home(session: Session, names: list[str]) -> str:
    return max(names, key=session.rank)


@pytest.mark.parametrize(
    "header",
    [
        "X-Claude-Code-Session-Id",
        "session-id",
        "session_id",
        "x-session-affinity",
        "x-session-id",
    ],
)
def test_a_header_names_the_session_before_the_body_does(header: str) -> None:
    by_header = session_of("k", CIMultiDict({header: "s"}), "another", 1.25)

    assert by_header == session_of("k", {}, "s", 1.25)


def test_an_empty_header_names_nothing() -> None:
    assert key_of("k", "s", session_id="") == key_of("k", "s")


def test_what_nothing_is_known_by_has_no_session() -> None:
    assert key_of("k", None) is None


def test_two_callers_never_share_a_session() -> None:
    assert len({key_of("k", "s"), key_of("l", "s"), key_of(None, "s"), key_of("ks", "")}) == 4


def test_half_a_character_in_a_name_is_no_reason_to_fail() -> None:
    assert key_of(None, "\ud800") is not None


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        ("user_0a_account__session_1b2c-3d", "1b2c-3d"),
        (json.dumps({"device_id": "0a", "session_id": "1b2c-3d"}), "1b2c-3d"),
        ("somebody", None),
        (json.dumps({"device_id": "0a"}), None),
        (7, None),
        (None, None),
    ],
)
def test_claude_codes_user_id_holds_its_session(user_id: Any, session: str | None) -> None:
    assert named_in_body(metadata={"user_id": user_id}) == session


@pytest.mark.parametrize("odd", [None, 7, "", [], {}])
def test_fields_of_the_wrong_type_name_nothing(odd: Any) -> None:
    assert named_in_body(odd, odd) is None


def test_a_prompt_cache_key_names_it() -> None:
    assert named_in_body("pc", {"user_id": "user_1_session_2"}) == "pc"


def test_a_conversation_keeps_its_head() -> None:
    assert head_of([SYSTEM, USER]) == head_of([SYSTEM, USER, ANSWER, NEXT])


@pytest.mark.parametrize(
    "other", [[USER], [SYSTEM, NEXT], [ANSWER, USER], [{**SYSTEM, "content": ""}, USER]]
)
def test_another_head_is_another_conversation(other: list[Any]) -> None:
    assert head_of(other) != head_of([SYSTEM, USER])


def test_the_head_is_the_same_read_or_unread() -> None:
    raw = [msgspec.Raw(msgspec.json.encode(turn)) for turn in (SYSTEM, USER, ANSWER)]

    assert head_of(raw) == head_of([SYSTEM, USER])


def test_without_a_word_of_the_user_the_first_turn_is_the_head() -> None:
    assert head_of([SYSTEM]) == head_of([SYSTEM, ANSWER]) is not None
    assert head_of([]) is None


@pytest.mark.parametrize("turns", [["hi"], [7, USER], [None], [{"role": 1}], [[]]])
def test_turns_that_are_none_have_a_head_all_the_same(turns: list[Any]) -> None:
    assert head_of(turns) is not None


@given(st.text(), NAMES)
def test_a_node_that_goes_moves_only_its_own_sessions(key: str, names: list[str]) -> None:
    session = Session(key, 1.25)
    before = home(session, names)

    for gone in set(names) - {before}:
        assert home(session, [name for name in names if name != gone]) == before


@given(st.text(), NAMES, st.text(min_size=1))
def test_a_node_that_comes_takes_sessions_and_moves_no_others(
    key: str, names: list[str], new: str
) -> None:
    session = Session(key, 1.25)

    assert home(session, [*names, new]) in {home(session, names), new}


def test_sessions_spread_evenly() -> None:
    names = ["a", "b", "c", "d"]
    homes = [home(Session(str(n), 1.25), names) for n in range(4000)]

    assert all(900 < homes.count(name) < 1100 for name in names)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=9), st.floats(1.0, 10.0))
def test_somebody_is_never_too_busy(loads: list[int], factor: float) -> None:
    session = Session("s", factor)

    assert not all(session.is_too_busy(load, loads) for load in loads)
