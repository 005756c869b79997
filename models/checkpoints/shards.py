"""A checkpoint in several safetensors files, and the index that says which tensor lies where.

    {"metadata": {…}, "weight_map": {"tensor": "model-00001-of-00002.safetensors", …}}

The files must hold exactly the tensors that the index says, each where it says.
"""

from __future__ import annotations

from pathlib import Path

from cortex.models.checkpoints.errors import CheckpointError, listed, naming, shown
from cortex.models.checkpoints.files import exists, named_file
from cortex.models.checkpoints.json import read_object
from cortex.models.checkpoints.safetensors import SafetensorsFile
from cortex.models.checkpoints.tensors import TensorInfo

INDEX = "model.safetensors.index.json"


def tensors_by_index(directory: Path) -> dict[str, TensorInfo]:
    """Return all tensors of the checkpoint in *directory*; raises CheckpointError."""
    index = directory / INDEX
    weight_map = read_object(index).get("weight_map")
    with naming(index):
        by_file = _by_file(weight_map)
        paths = {name: named_file(directory, name) for name in sorted(by_file)}
        if missing := [name for name, path in paths.items() if not exists(path)]:
            raise CheckpointError(f"names files that are not there: {listed(missing)}")
    found: dict[str, TensorInfo] = {}
    for name, path in paths.items():
        tensors = SafetensorsFile.open(path).tensors
        with naming(path):
            _check(set(tensors), by_file[name])
        found.update(tensors)
    return found


def _by_file(weight_map: object) -> dict[str, set[str]]:
    """Turn the map around: the tensors of each file, which are never none."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map")
    found: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"tensor {shown(tensor)} lies in {shown(name)}, which is no name")
        found.setdefault(name, set()).add(tensor)
    return found


def _check(tensors: set[str], indexed: set[str]) -> None:
    if missing := indexed - tensors:
        raise CheckpointError(f"lacks tensors that {INDEX} places here: {listed(missing)}")
    if strangers := tensors - indexed:
        raise CheckpointError(
            f"holds tensors that {INDEX} does not place here: {listed(strangers)}"
        )
