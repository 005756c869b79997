"""Which build runs here: package, commit, torch; nothing is imported to find out."""

from __future__ import annotations

from dataclasses import dataclass

from cortex.ipc.messages import Hello
from cortex.ipc.node_api import Version
from cortex.ipc.version import BUILD, version_of


@dataclass(frozen=True, slots=True)
class Build:
    """What is installed, looked up once at the start."""

    package_version: str
    git_sha: str
    torch_version: str | None
    nccl_version: str | None

    @classmethod
    def read(cls) -> Build:
        """Look at the installed packages."""
        return cls(
            package_version=BUILD.package_version,
            git_sha=BUILD.git_sha,
            torch_version=version_of("torch"),
            nccl_version=version_of("nvidia-nccl-cu13") or version_of("nvidia-nccl-cu12"),
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
