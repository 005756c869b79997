"""A daemon's settings: a frozen struct, from one TOML file, the environment and the command line.

    Settings     what a daemon takes: the struct, where its file lies, the prefix of its variables
    TomlFile     a file that was read, and the lines of its options
    Origin       where each option was set, so that what is wrong with it is said there
    Table        base of every struct that is a table of a file

The prefix and the path of an option, joined by ``__``, is its variable; a number is a place in an
array, which may grow by one: ``CORTEX_NEURONS__0__NAME``. The command line wins over the
environment, which wins over the file. What is wrong is one sentence, with its place.
"""

from __future__ import annotations

import copy
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from cortex.ipc.option_errors import is_table, place_of, type_at, what_is_wrong
from cortex.ipc.toml_lines import Keys, line_of, lines_of

S = TypeVar("S", bound=msgspec.Struct)

_PORT = r"([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_ADDRESS = rf"^(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]:\s]+)):(?P<port>{_PORT})\Z"
_NO_ADDRESS = "HOST:PORT or [IPV6]:PORT, with a port up to 65535"
Address = Annotated[str, Meta(pattern=_ADDRESS, description=_NO_ADDRESS)]
HostName = Annotated[
    str,
    Meta(pattern=r"^[^\s\[\]:/?#@]+\Z", description="the name of a host, without scheme and port"),
]

_TOML_PLACE = re.compile(r"(?P<words>.*) \(at line (?P<line>\d+), column \d+\)")


class ConfigError(Exception):
    """The configuration cannot be used; the text says where and why."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a file."""


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of an Address; an IPv6 host loses its brackets. Raise ConfigError."""
    found = re.match(_ADDRESS, address)
    if found is None:
        raise ConfigError(f"{address!r} is not an address: expected {_NO_ADDRESS}")
    return found["ipv6"] or found["host"], int(found["port"])


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach what listens on *host*."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class TomlFile:
    """What a file says."""

    path: Path
    tables: dict[str, Any]
    lines: dict[Keys, int]

    @classmethod
    def read(cls, path: Path) -> TomlFile:
        """Read *path*; raise ConfigError."""
        file = cls.read_if_there(path)
        if file is None:
            raise ConfigError(f"cannot read {path}: there is no such file")
        return file

    @classmethod
    def read_if_there(cls, path: Path) -> TomlFile | None:
        """Read *path*, or return None where there is nothing; raise ConfigError."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise ConfigError(f"cannot read {path}: it is not UTF-8") from exc
        try:
            return cls(path, tomllib.loads(text), lines_of(text))
        except RecursionError as exc:
            raise ConfigError(f"{path}: not TOML: it is nested too deeply") from exc
        except ValueError as exc:  # tomllib's own, and Python's for a number of 5,000 digits
            found = _TOML_PLACE.fullmatch(str(exc))
            where, words = (f"{path}:{found['line']}", found["words"]) if found else (path, exc)
            raise ConfigError(f"{where}: not TOML: {words}") from exc

    def typed(self, shape: type[S], not_yet: frozenset[str] = frozenset()) -> S:
        """Return what the file says as a *shape*; raise ConfigError."""
        try:
            return msgspec.convert(self.tables, shape)
        except msgspec.ValidationError as exc:
            raise Origin(self).wrong(*what_is_wrong(exc, shape, not_yet)) from exc


@dataclass(frozen=True)
class Origin:
    """Where options were set; what was set nowhere has its default."""

    file: TomlFile | None = None
    variables: dict[Keys, str] = field(default_factory=dict)
    command_line: frozenset[str] = frozenset()

    def wrong(self, keys: Keys, words: str) -> ConfigError:
        """Return the error that says *words* of the option at *keys*, with its place."""
        said = f"{place_of(keys)}: {words}" if keys else words
        if keys and keys[0] in self.command_line:
            return ConfigError(f"the command line: {said}")
        if variable := self._variable(keys):
            return ConfigError(f"{variable}: {words if keys in self.variables else said}")
        if self.file is None:
            return ConfigError(said)
        line = line_of(self.file.lines, keys)
        return ConfigError(f"{self.file.path}{f':{line}' if line else ''}: {said}")

    def refuse_twice(
        self, array: Keys, option: str, values: Sequence[str], *, is_secret: bool = False
    ) -> None:
        """Raise ConfigError where two tables of *array* have the same value of *option*."""
        for index, value in enumerate(values):
            if value in values[:index]:
                shown = "" if is_secret else f"{value!r} "
                raise self.wrong((*array, index, option), f"{shown}is there twice")

    def _variable(self, keys: Keys) -> str | None:
        """Return the variable that set *keys*, or all of a table around it, or a part of it."""
        around = (keys[:length] for length in range(len(keys), 0, -1))
        parts = (part for part in self.variables if keys and part[: len(keys)] == keys)
        return next((self.variables[at] for at in (*around, *parts) if at in self.variables), None)


@dataclass(frozen=True)
class Settings(Generic[S]):
    """What a daemon takes."""

    shape: type[S]
    prefix: str
    not_options: frozenset[str] = frozenset()
    """Variables that begin as ours do and are somebody else's."""
    not_yet: frozenset[str] = frozenset()
    """Options to come: refused as such, so that nobody relies on them."""
    spellings: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    """Options that a variable spells otherwise than a file, and how to read them."""

    def read(
        self,
        path: Path | None,
        default: Path,
        environment: Mapping[str, str],
        command_line: Mapping[str, Any] | None = None,
    ) -> tuple[S, Origin]:
        """Return the settings and their origin; raise ConfigError.

        *path* must exist; without one, the file at *default* may.
        """
        file = TomlFile.read(path) if path else TomlFile.read_if_there(default)
        tables: dict[str, Any] = {}
        if file is not None:
            file.typed(self.shape, self.not_yet)
            tables = copy.deepcopy(file.tables)
        variables = self._variables(environment)
        for keys, variable in sorted(variables.items(), key=_in_order):
            self._set(tables, keys, variable, environment[variable])
        tables |= command_line or {}
        origin = Origin(file, variables, frozenset(command_line or ()))
        try:
            return msgspec.convert(tables, self.shape, strict=False), origin
        except msgspec.ValidationError as exc:
            raise origin.wrong(*what_is_wrong(exc, self.shape, self.not_yet)) from exc

    def _variables(self, environment: Mapping[str, str]) -> dict[Keys, str]:
        ours = (v for v in environment if v.startswith(self.prefix) and v not in self.not_options)
        return {_keys(variable.removeprefix(self.prefix)): variable for variable in ours}

    def _set(self, tables: dict[str, Any], keys: Keys, variable: str, value: str) -> None:
        if not _is_text(value):
            raise ConfigError(f"{variable}: it is not UTF-8")
        spelling = self.spellings.get(place_of(keys))
        try:
            _put(tables, keys, spelling(value) if spelling else value)
        except LookupError:
            raise ConfigError(f"{variable}: there is no such place") from None
        if is_table(type_at(self.shape, keys)):
            raise ConfigError(f"{variable}: a table; add __ and one of its options")


def _is_text(value: str) -> bool:
    """Return whether *value* was UTF-8, before Python made surrogates of what was not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _keys(steps: str) -> Keys:
    return tuple(int(s) if s.isdecimal() else s for s in steps.lower().split("__"))


def _in_order(item: tuple[Keys, str]) -> list[tuple[bool, str | int]]:
    """Sort 2 before 10, so that arrays grow by one."""
    return [(isinstance(key, str), key) for key in item[0]]


def _put(tables: Any, keys: Keys, value: Any) -> None:
    """Put *value* at *keys*; raise LookupError where that would leave a gap in an array."""
    key, *rest = keys
    if isinstance(tables, list) != isinstance(key, int):
        raise LookupError
    if isinstance(key, int) and key == len(tables):
        tables.append(None)
    if rest:
        inner: Any = [] if isinstance(rest[0], int) else {}
        there = tables.get(key) if isinstance(tables, dict) else tables[key]
        if isinstance(there, type(inner)):
            inner = there
        _put(inner, tuple(rest), value)
        value = inner
    tables[key] = value
