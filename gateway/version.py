"""Which build this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cortex.ipc.node_api import Version

DISTRIBUTION = "cortex-serve"
UNKNOWN = "unknown"


def package_version(distribution: str = DISTRIBUTION) -> str:
    """Return the version that is installed, or ``unknown``."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return UNKNOWN


def commit_of(git: Path) -> str:
    """Return the commit that the checkout with the folder *git* is at, or ``unknown``."""
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        return (git / head.removeprefix("ref: ")).read_text(encoding="utf-8").strip()
    except OSError:
        return UNKNOWN


BUILD = Version(package_version(), commit_of(Path(__file__).resolve().parents[1] / ".git"))
"""Read once, when the daemon starts: its files may be replaced while it runs."""
