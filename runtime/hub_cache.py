"""The cache of the Hugging Face tools, which we share with them: what is here, and where.

    models--org--name/
      blobs/<hash>                     contents; ``<hash>.incomplete`` while one arrives
      snapshots/<commit>/<path>        links to blobs
      refs/<revision>                  the commit that a branch or tag was at
    .locks/models--org--name/<hash>.lock

A blob gets its name by an atomic rename once it is whole and checked, a revision its commit once
all that was wanted of it is here: so a revision that is here can be loaded, also after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from cortex.ipc.downloads import RepoFile
from cortex.ipc.errors import Unloadable
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.json import read_object
from cortex.models.checkpoints.shards import INDEX
from cortex.models.checkpoints.tensors import QUANTS
from cortex.runtime.hub_files import COMMIT, NEEDED, WHOLE, HubSource, is_model, quant_of, shards


def default_hub_cache(environment: Mapping[str, str]) -> Path:
    """Return where the Hugging Face tools keep models: HF_HUB_CACHE, HF_HOME, or the user's cache.

    Raise RuntimeError where there is no home directory.
    """
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    return hub_home(environment) / "hub"


def hub_home(environment: Mapping[str, str]) -> Path:
    """Return the home of the Hugging Face tools."""
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser()
    xdg = environment.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if xdg.startswith("/") else Path.home() / ".cache"
    return base / "huggingface"


class RepoCache:
    """One repository in the cache at *root*."""

    def __init__(self, root: Path, repo: str) -> None:
        folder = "models--" + repo.replace("/", "--")
        self._directory = root / folder
        self._locks = root / ".locks" / folder

    def blob(self, file: RepoFile) -> Path:
        """Return where the content of *file* lies once it is whole."""
        return self._directory / "blobs" / file.blob

    def partial(self, file: RepoFile) -> Path:
        """Return where it lies until then."""
        return self._directory / "blobs" / f"{file.blob}.incomplete"

    def lock(self, file: RepoFile) -> Path:
        """Return the lock of whoever fetches it."""
        return self._locks / f"{file.blob}.lock"

    def snapshot(self, commit: str) -> Path:
        """Return the directory of a commit."""
        return self._directory / "snapshots" / commit

    def bytes_here(self, file: RepoFile) -> int:
        """Return how much of *file* need not be fetched any more."""
        for path in (self.blob(file), self.partial(file)):
            try:
                return min(path.stat().st_size, file.size_bytes)
            except FileNotFoundError:
                continue
        return 0

    def has(self, commit: str, file: RepoFile) -> bool:
        """Whether *file* can be opened by its name."""
        return (self.snapshot(commit) / file.path).is_file()

    def link(self, commit: str, file: RepoFile) -> None:
        """Give the blob of *file* its name in the snapshot, in place of whatever has it."""
        name = self.snapshot(commit) / file.path
        name.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(self.blob(file), name.parent)
        new = name.with_name(f".{name.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(name)

    def remember(self, revision: str, commit: str) -> None:
        """Note which commit a branch or tag is at."""
        if revision == commit:
            return
        name = self._directory / "refs" / revision
        name.parent.mkdir(parents=True, exist_ok=True)
        new = name.with_name(f".{name.name}.{os.getpid()}")
        new.write_text(commit)
        new.replace(name)

    def commit(self, source: HubSource) -> str | None:
        """Return the commit that *source* was at when it was last fetched."""
        if source.is_commit:
            return source.revision
        try:
            commit = (self._directory / "refs" / source.revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if COMMIT.fullmatch(commit) else None


def find(root: Path, source: HubSource, quant: str | None) -> Path | None:
    """Return what a load of *source* would open, if all of it is in the cache at *root*."""
    repo = RepoCache(root, source.repo)
    commit = repo.commit(source)
    if commit is None:
        return None
    snapshot = repo.snapshot(commit)
    if quant is not None:
        found = _gguf(snapshot, quant)
        if found is not None or quant.lower() not in QUANTS:
            return found
    return snapshot if is_complete(snapshot) else None


def find_any(root: Path, source: HubSource) -> Path | None:
    """Return anything of *source* that has weights and a tokenizer: safetensors, else a GGUF."""
    if (found := find(root, source, None)) is not None:
        return found
    repo = RepoCache(root, source.repo)
    commit = repo.commit(source)
    return next(_ggufs(repo.snapshot(commit)), None) if commit else None


def is_complete(snapshot: Path) -> bool:
    """Whether the directory holds safetensors, all of them, and what a load needs beside them."""
    if not all((snapshot / name).is_file() for name in NEEDED):
        return False
    if (snapshot / WHOLE).is_file():
        return True
    try:
        names = shards(str(snapshot), read_object(snapshot / INDEX))
    except (CheckpointError, Unloadable):
        return False
    return all((snapshot / name).is_file() for name in names)


def _gguf(snapshot: Path, quant: str) -> Path | None:
    wanted = quant_of(f"x.{quant}.gguf")
    return next((path for path in _ggufs(snapshot) if quant_of(path.name) == wanted), None)


def _ggufs(snapshot: Path) -> Iterator[Path]:
    for path in sorted(snapshot.rglob("*.gguf")):
        if path.is_file() and is_model(path.name):
            yield path
