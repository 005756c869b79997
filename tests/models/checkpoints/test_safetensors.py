"""Safetensors headers: equal to the library's reading, and not to be fooled."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.safetensors import SafetensorsFile
from cortex.models.checkpoints.tensors import SAFETENSORS_TYPES


def file_of(header: Any, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def read(directory: Path, content: bytes) -> SafetensorsFile:
    path = directory / "model.safetensors"
    path.write_bytes(content)
    return SafetensorsFile.open(path)


def entry(
    begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32"
) -> dict[str, Any]:
    sizes = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}


def test_tensors_are_where_the_library_put_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).to(torch.bfloat16),
        "c": torch.tensor(7, dtype=torch.int64),
        "d": torch.zeros(2, 0, dtype=torch.float16),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})

    file = SafetensorsFile.open(path)

    content = path.read_bytes()
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert info.shape == tuple(tensor.shape)
        stored = content[info.offset : info.offset + info.nbytes]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_type_has_its_size() -> None:
    for name, stored in SAFETENSORS_TYPES.items():
        bits = 8 if name == "BOOL" else int(re.findall(r"\d+", name)[0])
        assert stored.block_bytes * 8 == bits


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has only 0 bytes"),
    "absurd header": (struct.pack("<Q", 1 << 60) + bytes(64), "claims a header of 1152921504"),
    "header behind the end": (struct.pack("<Q", 65) + bytes(64), "claims a header of 65 bytes"),
    "no JSON": (file_of(b"GGUF"), "the header is not valid JSON"),
    "no text": (file_of(b"\xff\xff"), "the header is not valid JSON"),
    "nested without end": (file_of(b'{"a":' * 100_000), "the header is not valid JSON"),
    "a number without end": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "the header is not valid"),
    "a list": (file_of([]), "the header is not a JSON object"),
    "duplicate names": (
        file_of(b'{"t": {}, "t": {}}'),
        "the header has the key 't' twice",
    ),
    "no offsets": (file_of({"t": {"dtype": "F32", "shape": [1]}}), "no dtype, shape and data_off"),
    "an entry that is none": (file_of({"t": 7}), "'t' has no dtype"),
    "unknown type": (file_of({"t": entry(0, 4, dtype="F4")}, 4), "unknown type 'F4'"),
    "negative size": (file_of({"t": entry(0, 4, [-1])}, 4), "no whole numbers"),
    "a size in words": (file_of({"t": entry(0, 4, ["1"])}, 4), "no whole numbers"),
    "a boolean size": (file_of({"t": entry(0, 4, [True])}, 4), "no whole numbers"),
    "another length": (file_of({"t": entry(0, 8, [3])}, 8), "takes 12 bytes.* span 8"),
    "behind the end": (file_of({"t": entry(0, 8)}, 7), "truncated or damaged"),
    "overlap": (file_of({"t": entry(0, 8), "u": entry(4, 12)}, 12), "'t' and 'u' overlap"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    content, says = DAMAGED[kind]

    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{says}"):
        read(tmp_path, content)


def test_a_file_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SafetensorsFile.open(tmp_path / "missing")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
ALMOST = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64"]) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 70), max_size=5) | JSON,
        "data_offsets": st.lists(st.integers(-1, 1 << 70), min_size=2, max_size=2) | JSON,
    }
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(st.text(max_size=3), ALMOST | JSON, max_size=3), data=st.integers(0, 9)
)
def test_any_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], data: int) -> None:
    try:
        file = read(tmp_path, file_of(header, data))
    except CheckpointError:
        return

    size = (tmp_path / "model.safetensors").stat().st_size
    assert all(0 <= t.offset <= t.offset + t.nbytes <= size for t in file.tensors.values())
