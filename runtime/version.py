"""Which build runs here: package, commit, torch; nothing is imported to find out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cortex.ipc.messages import Hello
from cortex.ipc.node_api import Version

DISTRIBUTION = "cortex-serve"
UNKNOWN = "unknown"


def package_version() -> str:
    """Return the version of the installed package."""
    return _version_of(DISTRIBUTION) or UNKNOWN


@dataclass(frozen=True, slots=True)
class Build:
    """What is installed, looked up once at the start."""

    package_version: str
    git_sha: str
    torch_version: str | None
    nccl_version: str | None

    @classmethod
    def read(cls) -> Build:
        """Look at the installed packages and at the checkout, if it is one."""
        return cls(
            package_version=package_version(),
            git_sha=git_sha(Path(__file__).resolve().parents[1]),
            torch_version=_version_of("torch"),
            nccl_version=_version_of("nvidia-nccl-cu13") or _version_of("nvidia-nccl-cu12"),
        )

    def version(self, hello: Hello | None) -> Version:
        """Return ``GET /version``; what a device process said of itself comes first."""
        return Version(
            package_version=self.package_version,
            git_sha=self.git_sha,
            torch_version=hello.torch_version if hello else self.torch_version,
            cuda_version=hello.cuda_version if hello else None,
            nccl_version=self.nccl_version,
        )


def git_sha(checkout: Path) -> str:
    """Return the commit that *checkout* is at, ``unknown`` where it is no git checkout."""
    git = checkout / ".git"
    head = _text(git / "HEAD")
    if not head.startswith("ref: "):
        return head or UNKNOWN
    reference = head.removeprefix("ref: ")
    pattern = rf"^([0-9a-f]+) {re.escape(reference)}$"
    packed = re.search(pattern, _text(git / "packed-refs"), re.MULTILINE)
    return _text(git / reference) or (packed[1] if packed else UNKNOWN)


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
