"""How settings are read, and the one sentence that says what is wrong with them, and where."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from cortex.ipc.settings import (
    Address,
    ConfigError,
    Origin,
    Settings,
    Table,
    is_loopback,
    split_address,
)


class Boat(Table, frozen=True):
    """One of ``[[boats]]``."""

    name: Annotated[str, Meta(pattern=r"^[a-z]+\Z", description="small letters")]
    crew: Annotated[int, Meta(ge=1)] = 1
    cargo: dict[str, Any] | None = None


class Tower(Table, frozen=True):
    """``[tower]``."""

    height_metres: float = 30.0
    is_lit: bool = False


class Harbour(Table, frozen=True):
    """All options of an invented daemon."""

    listen: Address = "127.0.0.1:1"
    weather: Literal["fair", "foul"] = "fair"
    boats: Literal["none"] | list[Boat] = "none"
    tower: Tower = Tower()


HARBOUR = Settings(
    Harbour,
    "HARBOUR_",
    not_options=frozenset({"HARBOUR_MASTER"}),
    not_yet=frozenset({"dock"}),
    spellings={"boats": lambda text: [{"name": name} for name in text.split(",")]},
)


def written(folder: Path, text: str) -> Path:
    path = folder / "harbour.toml"
    path.write_text(text, encoding="utf-8")
    return path


def read(
    environment: dict[str, str],
    path: Path | None = None,
    command_line: dict[str, Any] | None = None,
) -> Harbour:
    harbour, _ = HARBOUR.read(path, Path("/nonexistent/harbour.toml"), environment, command_line)
    return harbour


def refusal(
    environment: dict[str, str],
    path: Path | None = None,
    command_line: dict[str, Any] | None = None,
) -> str:
    """Return what is said, without the folder of *path*."""
    with pytest.raises(ConfigError) as caught:
        read(environment, path, command_line)
    return str(caught.value).replace(f"{path.parent}/" if path else "", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tower]\n\nis_litt = true\n", "3: tower.is_litt: unknown option; did you mean is_lit?"),
        ("[moat]\n", "1: moat: unknown option"),
        ("[sub.marine]\n", "1: sub: unknown option"),
        ("[dock]\n", "1: dock: not supported by this version"),
        ("[[boats]]\ncrew = 2\n", "1: boats[0]: name is missing"),
        ('[[boats]]\nname = "a"\n[[boats]]\nname = "B"\n', "4: boats[1].name: expected small"),
        ('[[boats]]\nname = "a"\ncruw = 2\n', "3: boats[0].cruw: unknown option; did you mean c"),
        ('[[boats]]\nname = "a"\ncrew = 0\n', "3: boats[0].crew: expected `int` >= 1"),
        ('boats = [\n  { name = "a" },\n  { name = "B" },\n]\n', "1: boats[1].name: expected"),
        ("tower.is_lit = 3\n", "1: tower.is_lit: expected `bool`, got `int`"),
        ("tower = 3\n", "1: tower: expected a table, got `int`"),
        ("boats = {}\n", "1: boats: expected `str | array`, got a table"),
        ('\nweather = "wet"\n', "2: weather: expected one of fair, foul"),
        ('listen = "here"\n', "1: listen: expected HOST:PORT"),
        ('listen = "here:70000"\n', "1: listen: expected HOST:PORT"),
    ],
)
def test_a_wrong_option_is_named_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    assert refusal({}, written(tmp_path, text)).startswith(f"harbour.toml:{said}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\n[tower\n", "harbour.toml:2: not TOML: Expected ']'"),
        (b'listen = "', "harbour.toml: not TOML: "),
        (b"\xff\xfe", "cannot read harbour.toml: it is not UTF-8"),
    ],
)
def test_a_file_that_is_not_toml_is_one_sentence(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "harbour.toml"
    path.write_bytes(data)

    assert refusal({}, path).startswith(said)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    said = refusal({}, tmp_path / "harbour.toml")

    assert said == "cannot read harbour.toml: there is no such file"


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "harbour.toml").mkdir()

    assert refusal({}, tmp_path / "harbour.toml") == "cannot read harbour.toml: Is a directory"


def test_without_any_file_the_defaults_serve() -> None:
    assert read({}) == Harbour()


def test_the_file_in_the_default_place_is_read(tmp_path: Path) -> None:
    harbour, origin = HARBOUR.read(None, written(tmp_path, 'weather = "foul"'), {})

    assert harbour.weather == "foul"
    assert origin.file is not None


def test_a_default_file_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        HARBOUR.read(None, tmp_path, {})


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'listen = "a:1"\nweather = "fair"\n[tower]\nheight_metres = 1.0\n')
    environment = {"HARBOUR_LISTEN": "b:2", "HARBOUR_WEATHER": "foul"}

    harbour = read(environment, path, {"listen": "c:3"})

    assert harbour == Harbour("c:3", "foul", "none", Tower(1.0))


def test_a_variable_is_read_as_the_type_of_its_option() -> None:
    harbour = read({"HARBOUR_TOWER__HEIGHT_METRES": "7", "HARBOUR_TOWER__IS_LIT": "true"})

    assert harbour.tower == Tower(7.0, is_lit=True)


def test_a_file_is_not_read_so_leniently(tmp_path: Path) -> None:
    assert "expected `bool`, got `str`" in refusal({}, written(tmp_path, 'tower.is_lit = "true"'))


def test_a_variable_may_have_a_spelling_of_its_own() -> None:
    assert read({"HARBOUR_BOATS": "a,b"}).boats == [Boat("a"), Boat("b")]


def test_variables_may_name_a_whole_fleet_in_any_order() -> None:
    names = {f"HARBOUR_BOATS__{n}__NAME": "abcdefghijkl"[n] for n in reversed(range(12))}

    harbour = read({**names, "HARBOUR_BOATS__11__CREW": "3"})

    assert harbour.boats == [*map(Boat, "abcdefghijk"), Boat("l", 3)]


def test_a_variable_may_change_one_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[[boats]]\nname = "a"\n')

    assert read({"HARBOUR_BOATS__0__CREW": "2"}, path).boats == [Boat("a", 2)]


def test_a_variable_may_replace_the_word_for_none(tmp_path: Path) -> None:
    path = written(tmp_path, 'boats = "none"\n')

    assert read({"HARBOUR_BOATS__0__NAME": "a"}, path).boats == [Boat("a")]


def test_variables_of_others_are_not_ours() -> None:
    assert read({"HARBOUR_MASTER": "me", "HOME": "/root"}) == Harbour()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HARBOUR_LISTNE", "x", ": unknown option; did you mean listen?"),
        ("HARBOUR_TOWER__IS_LITT", "x", ": unknown option; did you mean is_lit?"),
        ("HARBOUR_DOCK", "x", ": not supported by this version"),
        ("HARBOUR_TOWER", "x", ": a table; add __ and one of its options"),
        ("HARBOUR_TOWER__HEIGHT_METRES", "tall", ": expected `float`, got `str`"),
        ("HARBOUR_TOWER__0", "x", ": a table; add __ and one of its options"),
        ("HARBOUR_0", "x", ": there is no such place"),
        ("HARBOUR_BOATS__1__NAME", "a", ": there is no such place"),
        ("HARBOUR_BOATS__0__CREW", "2", ": boats[0]: name is missing"),
        ("HARBOUR_BOATS", "a,B", ": boats[1].name: expected small letters"),
        ("HARBOUR_LISTEN", "\udcff:1", ": it is not UTF-8"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, said: str) -> None:
    assert refusal({variable: value}) == variable + said


def test_what_is_wrong_on_the_command_line_is_said_to_be_there(tmp_path: Path) -> None:
    path = written(tmp_path, 'weather = "fair"')

    said = refusal({"HARBOUR_WEATHER": "fair"}, path, {"weather": "wet"})

    assert said == "the command line: weather: expected one of fair, foul"


def test_what_does_not_go_together_is_said_where_it_was_set(tmp_path: Path) -> None:
    path = written(tmp_path, '[[boats]]\nname = "a"\n')
    _, origin = HARBOUR.read(path, path, {"HARBOUR_BOATS__1__NAME": "a"})

    with pytest.raises(ConfigError, match=r"^HARBOUR_BOATS__1__NAME: 'a' is there twice"):
        origin.refuse_twice(("boats",), "name", ["a", "a"])
    assert str(origin.wrong(("boats", 0), "it leaks")) == f"{path}:1: boats[0]: it leaks"
    assert str(origin.wrong((), "it is foggy")) == f"{path}: it is foggy"


def test_a_secret_that_is_there_twice_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"^keys\[1\]\.key: is there twice"):
        Origin().refuse_twice(("keys",), "key", ["sk-1", "sk-1"], is_secret=True)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("a.lan:80", "a.lan", 80), ("[::1]:0", "::1", 0), ("0.0.0.0:65535", "0.0.0.0", 65535)],
)
def test_an_address_is_a_host_and_a_port(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)


@pytest.mark.parametrize(
    "address", ["80", "a", "a:", ":80", "::1:80", "a:65536", "a:80\n", "a b:1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        split_address(address)


@pytest.mark.parametrize(
    ("host", "is_it"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("box.lan", False),
        ("127.0.0.1.evil.lan", False),
    ],
)
def test_what_only_this_host_can_reach_is_known(host: str, is_it: bool) -> None:
    assert is_loopback(host) == is_it
