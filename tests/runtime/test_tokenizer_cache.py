"""A tokenizer is parsed once per file, as long as the file is the same."""

import os
from pathlib import Path
from typing import cast

import pytest

from cortex.runtime.tokenizer import Tokenizer
from cortex.runtime.tokenizer_cache import TokenizerCache


class Reader:
    """Reads a different tokenizer every time."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> Tokenizer:
        self.reads += 1
        return cast("Tokenizer", object())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    return file


def test_the_same_file_is_read_once_also_by_another_name(file: Path, tmp_path: Path) -> None:
    cache, read = TokenizerCache(), Reader()
    link = tmp_path / "link"
    link.symlink_to(file)

    assert cache.of([file], read) is cache.of([link], read)
    assert read.reads == 1


def test_a_file_that_changed_is_read_again(file: Path) -> None:
    cache, read = TokenizerCache(), Reader()
    first = cache.of([file], read)
    os.utime(file, ns=(1, 1))

    assert cache.of([file], read) is not first


def test_a_file_that_is_not_there_is_no_part_of_it(file: Path, tmp_path: Path) -> None:
    cache, read = TokenizerCache(), Reader()
    first = cache.of([file, tmp_path / "tokenizer_config.json"], read)
    (tmp_path / "tokenizer_config.json").write_text("{}")

    assert cache.of([file, tmp_path / "tokenizer_config.json"], read) is not first


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    cache, read = TokenizerCache(kept=2), Reader()
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.touch()
        cache.of([file], read)
    cache.of([files[2]], read)

    assert read.reads == 3
    cache.of([files[0]], read)
    assert read.reads == 4


def test_what_cannot_be_read_is_not_kept(file: Path) -> None:
    def fails() -> Tokenizer:
        raise ValueError

    cache, read = TokenizerCache(), Reader()
    with pytest.raises(ValueError):  # noqa: PT011 - the double's own
        cache.of([file], fails)
    cache.of([file], read)

    assert read.reads == 1
