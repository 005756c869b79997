"""Damaged on purpose: whatever a checkpoint's files hold, it loads or is refused in words.

Refused means CheckpointError, and within memory that the files' own size bounds: parsed JSON takes
up to 25 times its bytes, a GGUF header no more. The largest thing here is a megabyte, so that a
claim of any more than that would stand out.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.json import parse_object
from cortex.models.checkpoints.shards import INDEX
from tiny_models import SIZES, loaded, random_model, write_gguf

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
}
BYTES_PER_BYTE = 30
BYTES_AT_LEAST = 4 << 20  # buffers, modules and exceptions of a file that says nothing
WORDS_AT_MOST = 2000  # of a refusal, paths included

FUZZ = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def loads_or_refuses(path: Path) -> None:
    """Load *path*; the only error may be ours, in few words, within few bytes."""
    files = [path] if path.is_file() else list(path.iterdir())
    size = sum(file.stat().st_size for file in files if file.is_file())
    refusal = ""
    tracemalloc.start()
    try:
        loaded(path)
    except CheckpointError as exc:
        refusal = str(exc)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert refusal.isprintable()
    assert len(refusal) < WORDS_AT_MOST
    assert peak < BYTES_AT_LEAST + BYTES_PER_BYTE * size


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    write_gguf(path, random_model("qwen2", **SMALL), "Q5_1")
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    random_model("qwen3", **SMALL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    random_model("qwen3", **SMALL).save_pretrained(path, max_shard_size="20KB")
    return path


def copy_of(directory: Path, tmp_path: Path) -> Path:
    shutil.copytree(directory, tmp_path / "copy", dirs_exist_ok=True)
    return tmp_path / "copy"


def header_bytes(path: Path) -> int:
    return min(tensor.offset for tensor in Checkpoint.open(path).tensors.values())


def test_what_is_not_damaged_loads(gguf_file: Path, directory: Path, sharded: Path) -> None:
    for path in (gguf_file, directory, sharded):
        assert loaded(path).caches.layers == 1


def test_a_gguf_file_cut_anywhere_in_its_header_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    content = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"

    for length in range(header_bytes(gguf_file)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut.gguf: "):
            Checkpoint.open(path)


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_gguf_file_cut_anywhere_is_refused(gguf_file: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    content = gguf_file.read_bytes()
    last = max(t.offset + t.nbytes for t in Checkpoint.open(gguf_file).tensors.values())
    path.write_bytes(content[: int(share * last)])

    with pytest.raises(CheckpointError):
        Checkpoint.open(path)


def test_a_safetensors_file_cut_anywhere_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = copy_of(directory, tmp_path)
    weights = copy / "model.safetensors"
    header, size = header_bytes(copy), weights.stat().st_size

    for length in [*range(size - 1, header, -97), *range(header, -1, -1)]:
        os.truncate(weights, length)
        with pytest.raises(CheckpointError, match=r"model.safetensors"):
            Checkpoint.open(copy)


FLIPS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4
)


def flipped(content: bytes, flips: list[tuple[float, int]], within: int) -> bytes:
    """Change the bits of bytes that lie at shares of the first *within* bytes."""
    changed = bytearray(content)
    for share, bits in flips:
        changed[int(share * within)] ^= bits
    return bytes(changed)


@FUZZ
@given(flips=FLIPS)
def test_flipped_bits_in_a_gguf_header_do_no_harm(
    gguf_file: Path, tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    path = tmp_path / "flipped.gguf"
    path.write_bytes(flipped(gguf_file.read_bytes(), flips, header_bytes(gguf_file)))

    loads_or_refuses(path)


@FUZZ
@given(
    place=st.floats(0, 1, exclude_max=True),
    value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1]),
)
def test_a_huge_number_anywhere_in_a_gguf_header_does_no_harm(
    gguf_file: Path, tmp_path: Path, place: float, value: int
) -> None:
    content = bytearray(gguf_file.read_bytes())
    at = int(place * header_bytes(gguf_file))
    content[at : at + 8] = struct.pack("<Q", value)
    path = tmp_path / "huge.gguf"
    path.write_bytes(content)

    loads_or_refuses(path)


@FUZZ
@given(flips=FLIPS, name=st.sampled_from(["model.safetensors", "config.json"]))
def test_flipped_bits_in_a_directory_do_no_harm(
    directory: Path, tmp_path: Path, flips: list[tuple[float, int]], name: str
) -> None:
    copy = copy_of(directory, tmp_path)
    content = (copy / name).read_bytes()
    within = header_bytes(directory) if name == "model.safetensors" else len(content)
    (copy / name).write_bytes(flipped(content, flips, within))

    loads_or_refuses(copy)


@FUZZ
@given(flips=FLIPS)
def test_flipped_bits_in_an_index_do_no_harm(
    sharded: Path, tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    copy = copy_of(sharded, tmp_path)
    content = (copy / INDEX).read_bytes()
    (copy / INDEX).write_bytes(flipped(content, flips, len(content)))

    loads_or_refuses(copy)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    *SIZES,
    *("model_type", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"),
    *("hidden_act", "attention_bias", "sliding_window", "layer_types", "use_sliding_window"),
)


@FUZZ
@given(
    model_type=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
)
@example(model_type="llama", changes={"rope_parameters": {"rope_theta": 10**400}})
@example(model_type="qwen3", changes={"rms_norm_eps": float("nan")})
@example(model_type="qwen3", changes={"model_type": ["llama"]})
@example(model_type="qwen3", changes={"hidden_size": 1 << 24, "num_attention_heads": 1 << 23})
@example(model_type="qwen3", changes={"num_attention_heads": 4, "num_key_value_heads": 4})
def test_any_value_in_config_json_is_read_or_refused(
    directory: Path, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    copy = copy_of(directory, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    changed = {**config, "model_type": model_type, **changes}
    (copy / "config.json").write_text(json.dumps(changed))

    loads_or_refuses(copy)


def test_a_value_nested_as_deeply_as_it_can_be_read_is_refused_in_words(
    directory: Path, tmp_path: Path
) -> None:
    copy = copy_of(directory, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    rest = json.dumps({key: value for key, value in config.items() if key != "hidden_act"})

    for depth in range(700, 1000, 7):
        nested = "[" * depth + "]" * depth
        (copy / "config.json").write_text(f'{{"hidden_act": {nested}, {rest[1:]}')
        with pytest.raises(CheckpointError):
            loaded(copy)


def change_header(weights: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file, changed in place by *change*."""
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


OFFSETS = st.lists(st.integers(-1, 1 << 65), min_size=1, max_size=3)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "F64", "I8", "F8_E4M3", "Q4_0"]) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 65), max_size=10) | JSON,
        "data_offsets": OFFSETS | JSON,
    },
)


@FUZZ
@given(number=st.integers(0, 11), fields=FIELDS)
@example(number=0, fields={"shape": [1 << 62] * 8})
@example(number=0, fields={"shape": [0, 32], "data_offsets": [0, 0]})
@example(number=0, fields={"data_offsets": [10**4299, 2 * 10**4299]})
def test_any_entry_in_a_safetensors_header_is_read_or_refused(
    directory: Path, tmp_path: Path, number: int, fields: dict[str, Any]
) -> None:
    copy = copy_of(directory, tmp_path)

    def change(entries: dict[str, Any]) -> None:
        name = sorted(entries)[number % len(entries)]
        entries[name] = {**entries[name], **fields}

    change_header(copy / "model.safetensors", change)

    loads_or_refuses(copy)


@pytest.mark.parametrize(
    "shapes",
    [
        [(0, 32), (0, 32), (64, 32)],
        [(33, 32), (15, 32), (16, 32)],
        [(64, 32), (0, 32), (0, 32)],
        [(32, 16), (32, 16), (32, 32)],
    ],
)
def test_rows_that_add_up_but_are_another_models_are_refused(
    tmp_path: Path, shapes: list[tuple[int, int]]
) -> None:
    model = random_model("llama", **SMALL)
    model.save_pretrained(tmp_path)
    names = [f"model.layers.0.self_attn.{word}_proj.weight" for word in "qkv"]

    def change(entries: dict[str, Any]) -> None:
        begin = min(entries[name]["data_offsets"][0] for name in names)
        for name, shape in zip(names, shapes, strict=True):
            end = begin + 4 * shape[0] * shape[1]
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
            begin = end

    change_header(tmp_path / "model.safetensors", change)

    with pytest.raises(CheckpointError, match=r"by the configuration|overlap|truncated"):
        loaded(tmp_path)


@FUZZ
@given(weight_map=st.dictionaries(st.text(max_size=5), st.text(max_size=5) | JSON, max_size=4))
@example(weight_map={"t": "../" * 99})
@example(weight_map={"t": "\0"})
@example(weight_map={"t": "/dev/zero"})
def test_any_index_is_read_or_refused(
    sharded: Path, tmp_path: Path, weight_map: dict[str, Any]
) -> None:
    copy = copy_of(sharded, tmp_path)
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    loads_or_refuses(copy)


MEGABYTE = 1 << 20
BOMBS = {
    "empty lists": b'{"a":[' + b"[]," * (MEGABYTE // 3) + b"[]]}",
    "empty objects": b'{"a":[' + b"{}," * (MEGABYTE // 3) + b"{}]}",
    "short keys": b"{" + b",".join(b'"%x":{}' % n for n in range(MEGABYTE // 10)) + b"}",
    "small numbers": b'{"a":[' + b"-9," * (MEGABYTE // 3) + b"0]}",
    "fractions": b'{"a":[' + b"1e,".replace(b",", b"9,") * (MEGABYTE // 4) + b"0]}",
    "brackets": b'{"a":' + b"[" * MEGABYTE,
    "escapes": b'{"a":"' + rb"\ud83d\ude00" * (MEGABYTE // 12) + b'"}',
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_json_is_parsed_within_a_multiple_of_its_size(
    directory: Path, tmp_path: Path, bomb: str, name: str
) -> None:
    copy = copy_of(directory, tmp_path)
    text = BOMBS[bomb]
    is_header = name == "model.safetensors"
    (copy / name).write_bytes(struct.pack("<Q", len(text)) + text if is_header else text)

    loads_or_refuses(copy)


def test_a_key_that_comes_again_after_many_is_found_in_one_pass() -> None:
    text = json.dumps({str(number): 0 for number in range(300_000)}).encode()

    with pytest.raises(CheckpointError, match="has the key '299999' twice"):
        parse_object(text[:-1] + b', "299999": 0}', "it")


ENTRY = struct.Struct("<QcI")  # a key of one letter
ARRAYS = {
    "bytes": (0, 1),
    "shorts": (2, 2),
    "integers": (5, 4),
    "floats": (6, 4),
    "booleans": (7, 1),
    "empty strings": (8, 8),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_gguf_arrays_are_read_within_a_multiple_of_their_size(tmp_path: Path, kind: str) -> None:
    number, width = ARRAYS[kind]
    count = MEGABYTE // width
    filling = {"booleans": b"\1", "empty strings": b"\0"}.get(kind, b"\x81")
    array = struct.pack("<IQ", number, count) + filling * MEGABYTE
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + ENTRY.pack(1, b"k", 9) + array
    (tmp_path / "bomb.gguf").write_bytes(content)

    loads_or_refuses(tmp_path / "bomb.gguf")


def test_many_gguf_entries_are_read_within_a_multiple_of_their_size(tmp_path: Path) -> None:
    entries = b"".join(
        struct.pack("<Q", 3) + number.to_bytes(2, "big").hex()[:3].encode() + b"\0\0\0\0\1"
        for number in range(0, 1 << 16, 16)
    )
    tensors = b"".join(
        struct.pack("<Q", 4) + b"%04x" % number + struct.pack("<IQIQ", 1, 0, 0, 0)
        for number in range(1 << 15)
    )
    content = b"GGUF" + struct.pack("<IQQ", 3, 1 << 15, 1 << 12) + entries + tensors
    (tmp_path / "bomb.gguf").write_bytes(content + bytes(64))

    loads_or_refuses(tmp_path / "bomb.gguf")


def test_a_header_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    texts = 5
    entry = struct.pack("<Q", 1) + b"%d" + struct.pack("<IQ", 8, 1 << 24)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, texts))
        for number in range(texts):
            file.write(entry.replace(b"%d", b"%d" % number))
            file.seek(1 << 24, os.SEEK_CUR)  # a hole: the file takes no room on the disk
        file.truncate(file.tell())

    with pytest.raises(CheckpointError, match="the header is larger than the 67108864 bytes"):
        Checkpoint.open(path)


def test_a_safetensors_header_larger_than_we_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 26))
    os.truncate(path, 1 << 27)

    with pytest.raises(CheckpointError, match="claims a header of 67108864 bytes"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["tiny.gguf", "model.safetensors", "config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_hang(
    directory: Path, tmp_path: Path, name: str
) -> None:
    copy = copy_of(directory, tmp_path)
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)

    with pytest.raises(CheckpointError, match=f"{name}: is no regular file"):
        Checkpoint.open(copy / name if name.endswith(".gguf") else copy)


def test_a_path_too_long_to_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        Checkpoint.open(tmp_path / ("a" * 5000))
