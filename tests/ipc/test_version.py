"""Which build this is."""

from pathlib import Path

import pytest

from cortex.ipc.version import BUILD, DISTRIBUTION, UNKNOWN, commit_of, version_of

ON_MAIN = "ref: refs/heads/main\n"


def written(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "commit"),
    [
        ({"HEAD": ON_MAIN, "refs/heads/main": "abc123\n"}, "abc123"),
        ({"HEAD": ON_MAIN, "packed-refs": "# pack-refs\nfed987 refs/heads/main\n"}, "fed987"),
        (
            {"HEAD": ON_MAIN, "refs/heads/main": "abc1\n", "packed-refs": "fed9 refs/heads/main"},
            "abc1",
        ),
        ({"HEAD": ON_MAIN, "packed-refs": "fed987 refs/heads/main2\n"}, UNKNOWN),
        ({"HEAD": "abc123\n"}, "abc123"),
        ({"HEAD": ON_MAIN}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_the_commit_is_read_from_the_checkout(
    tmp_path: Path, files: dict[str, str], commit: str
) -> None:
    written(tmp_path / ".git", files)

    assert commit_of(tmp_path) == commit


@pytest.mark.parametrize(
    "refs", [{"refs/heads/main": "abc"}, {"packed-refs": "abc refs/heads/main"}]
)
def test_a_second_work_tree_knows_its_commit(tmp_path: Path, refs: dict[str, str]) -> None:
    own = "first/.git/worktrees/second"
    written(tmp_path / "first/.git", refs)
    written(tmp_path, {f"{own}/HEAD": ON_MAIN, f"{own}/commondir": "../..\n"})
    written(tmp_path, {"second/.git": f"gitdir: {tmp_path / own}\n"})

    assert commit_of(tmp_path / "second") == "abc"


def test_the_build_is_the_installed_package() -> None:
    assert BUILD.package_version == version_of(DISTRIBUTION) != UNKNOWN


def test_what_is_not_installed_has_no_version() -> None:
    assert version_of("no-such-distribution-here") is None
