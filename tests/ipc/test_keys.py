"""Keys: in headers, compared, in files."""

import os
from pathlib import Path

import pytest
from multidict import CIMultiDict

from cortex.ipc.keys import digest, is_one_of, keys_in, read_keys
from cortex.ipc.settings import ConfigError


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    """Return a file with *text* and *mode*."""
    path = folder / "keys"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def refusal(path: Path) -> str:
    """Return in which words the file is refused, without its folder."""
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("headers", "keys"),
    [
        ([("authorization", "Bearer one")], ["one"]),
        ([("Authorization", "bearer   one ")], ["one"]),
        ([("X-API-Key", "one")], ["one"]),
        ([("x-api-key", "two"), ("Authorization", "Bearer one")], ["one", "two"]),
        ([("Authorization", "Basic abc")], []),
        ([("Authorization", "Bearer")], [""]),
        ([], []),
    ],
    ids=str,
)
def test_a_request_carries_keys_in_two_ways(
    headers: list[tuple[str, str]], keys: list[str]
) -> None:
    assert list(keys_in(CIMultiDict(headers))) == keys


def test_a_key_is_known_by_its_digest() -> None:
    known = [digest("first-key"), digest("second-key")]

    assert is_one_of("second-key", known)
    assert not is_one_of("third-key", known)
    assert not is_one_of("", known)


def test_a_key_that_is_no_text_is_nobody_s() -> None:
    assert not is_one_of("\udcff", [digest("first-key")])


def test_a_file_has_a_key_per_line_and_comments(tmp_path: Path) -> None:
    path = written(tmp_path, "# of the gateway\n\n  first-key  \nsecond-key\r\n")

    assert read_keys(path) == ("first-key", "second-key")


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_file_may_be_read_by_its_group(tmp_path: Path, mode: int) -> None:
    assert read_keys(written(tmp_path, "first-key", mode)) == ("first-key",)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    said = refusal(written(tmp_path, "first-key", mode))

    assert said.startswith("keys holds a secret and has the mode rw-")
    assert said.endswith("chmod 640 or 600 it")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "keys holds no key: write one per line"),
        ("# only a comment\n", "keys holds no key: write one per line"),
        ("first-key\nshort", "keys: key 2 has less than 8 characters"),
        ("first key", "keys: key 1 is not printable ASCII without spaces"),
        ("schlüssel", "keys: key 1 is not printable ASCII without spaces"),
        (b"\xff" * 20, "cannot read keys: it is not UTF-8"),
        ("x" * 100_000, "keys is larger than 64 KiB: not a file of secrets"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_cannot_be_used_is_refused_without_telling_a_key(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    assert refusal(written(tmp_path, content)) == said


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "keys") == "cannot read keys: No such file or directory"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(Path(os.devnull)).endswith("null: it is not a file")
