"""What every dialect shares in reading a body; test_openai.py has what requests are made of."""

import msgspec
import pytest

from cortex.ipc.errors import InvalidRequest, MalformedJson, UnsupportedParameter
from cortex.ipc.node_api import ClearPrefixCacheRequest
from cortex.ipc.requests import Parameters, decode_body, decode_object

PARAMETERS = Parameters(
    without_effect=frozenset({"user"}),
    neutral={"tools": (None, [])},
    unknown="{name}: who?",
    unsupported="{name}: not here",
)


class Turn(msgspec.Struct):
    """Somebody speaks."""

    role: str


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """A request."""

    turns: list[Turn] = []

    def __post_init__(self) -> None:
        if len(self.turns) > 1:
            raise ValueError("too many turns")


@pytest.mark.parametrize(
    ("raw", "said"),
    [({"tools": [1]}, "tools: not here"), ({"{tools}": []}, "{tools}: who?")],
)
def test_a_dialect_refuses_in_its_own_words(raw: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        PARAMETERS.refuse_unsupported(raw, frozenset())

    assert (str(refusal.value), refusal.value.param) == (said, next(iter(raw)))


def test_what_is_honoured_neutral_or_without_effect_passes() -> None:
    PARAMETERS.refuse_unsupported({"model": 1, "tools": [], "user": 3}, frozenset({"model"}))


def test_the_place_is_in_the_words_and_beside_them() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode_body(b'{"turns": [{"role": 3}]}', Ask)

    assert str(refusal.value) == "turns[0].role: Expected `str`, got `int`"
    assert refusal.value.param == "turns[0].role"


@pytest.mark.parametrize(
    ("body", "place", "words"),
    [
        (b'{"x": 1}', "x", "unknown field"),
        (b'{"turns": [{}]}', "turns[0].role", "field required"),
    ],
)
def test_a_field_that_lacks_or_is_too_much_is_the_place(
    body: bytes, place: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode_body(body, Ask)

    assert (str(refusal.value), refusal.value.param) == (f"{place}: {words}", place)


def test_what_is_wrong_with_the_whole_has_no_place() -> None:
    with pytest.raises(InvalidRequest, match="too many turns") as refusal:
        decode_body(b'{"turns": [{"role": "a"}, {"role": "b"}]}', Ask)

    assert refusal.value.param is None


def test_a_body_that_is_not_json_is_malformed() -> None:
    with pytest.raises(MalformedJson):
        decode_body(b"{", Ask)


@pytest.mark.parametrize("half", [r"\ud800", r"\uD83e x", r"\udc00", r"\ud800\u0041"])
def test_half_a_character_is_refused_as_that(half: str) -> None:
    with pytest.raises(MalformedJson, match="half of a surrogate pair"):
        decode_object(f'{{"a": "{half}"}}'.encode())


def test_a_pair_and_a_body_that_is_cut_are_not_half_a_character() -> None:
    assert decode_object(rb'{"a": "\ud83e\udd8a"}') == {"a": "\U0001f98a"}
    with pytest.raises(MalformedJson, match="truncated"):
        decode_object(rb'{"a": "\ud83e\udd8a"')


def test_an_empty_body_is_answered_with_the_one_that_is_wanted() -> None:
    with pytest.raises(MalformedJson, match=r'it is empty, and must be \{"model_id": \.\.\.\}'):
        decode_body(b" ", ClearPrefixCacheRequest)
