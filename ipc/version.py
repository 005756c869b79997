"""Which build this is: the installed package and the checkout tell; nothing is run to find out."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from cortex.ipc.node_api import Version

DISTRIBUTION = "cortex-serve"
UNKNOWN = "unknown"


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit_of(checkout: Path) -> str:
    """Return the commit that *checkout* is at, ``unknown`` where it is no git checkout."""
    git = checkout / ".git"
    if link := _text(git):  # a second work tree: a file, which names a folder of the first
        git = checkout / link.removeprefix("gitdir: ")
    head = _text(git / "HEAD")
    if not head.startswith("ref: "):
        return head or UNKNOWN
    reference = head.removeprefix("ref: ")
    shared = git / _text(git / "commondir")
    pattern = rf"^([0-9a-f]+) {re.escape(reference)}$"
    packed = re.search(pattern, _text(shared / "packed-refs"), re.MULTILINE)
    return _text(shared / reference) or (packed[1] if packed else UNKNOWN)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


BUILD = Version(
    package_version=version_of(DISTRIBUTION) or UNKNOWN,
    git_sha=commit_of(Path(__file__).resolve().parents[1]),
)
"""Read once, when the process starts: its files may be replaced while it runs."""
