"""Opening the files of a checkpoint, which are not trusted to be files nor to lie where they say.

A name that stands inside a file must be a plain one, and what it names must lie in the checkpoint's
own directory: a link may lead out of it only as those of a Hugging Face cache do,

    models--org--name/snapshots/<revision>/model-00001-of-00002.safetensors
        -> ../../blobs/<hash>           and no blob is a link to elsewhere
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from cortex.models.checkpoints.errors import CheckpointError, naming, shown


def open_file(path: Path) -> FileIO:
    """Open *path* for reading; a pipe, which could hang, or a device is a CheckpointError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("is no regular file")
    return FileIO(descriptor)


def exists(path: Path) -> bool:
    """Whether *path* is there; raises CheckpointError where that cannot be known."""
    with naming(path):
        return path.exists()


def named_file(directory: Path, name: str) -> Path:
    """Return the file that a checkpoint in *directory* calls *name*; raises CheckpointError."""
    if not name or name in (".", "..") or not name.isprintable() or {"/", "\\"} & {*name}:
        raise CheckpointError(f"{shown(name)} is no plain name of a file")
    path = directory / name
    home, target = _followed(directory), _followed(path)
    places = [home]
    if home.parent.name == "snapshots":
        places.append(home.parent.parent / "blobs")
    if target.parent not in places:
        raise CheckpointError(
            f"{path} is a link that leaves its directory, to {shown(str(target))}"
        )
    return path


def _followed(path: Path) -> Path:
    """Follow all links; where they go round in circles ``Path.resolve`` would raise, by version."""
    return Path(os.path.realpath(path))
