"""GGUF headers: equal to the gguf library's reading, and not to be fooled."""

from __future__ import annotations

import stat
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.tensors import TensorInfo

LIMIT_BYTES = 8 << 20  # far above what reading a tiny file takes, far below what headers can claim


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    head = string(name) + struct.pack("<I", len(sizes))
    return head + struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)


def header(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    data: int = 0,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32 + data)


def read(directory: Path, content: bytes) -> GGUFFile:
    path = directory / "a.gguf"
    path.write_bytes(content)
    return GGUFFile.open(path)


def an_array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return entry("a", 9, struct.pack("<IQ", kind, count) + elements)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file with a bit of everything by the gguf library."""
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -3)
    writer.add_uint32("u32", 1 << 31)
    writer.add_int32("i32", -5)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -7)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 🙂")
    writer.add_array("words", ["a", "", "日本"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("fractions", [0.25, 0.5])
    writer.add_array("flags", [True, False])
    for kind, shape in {"F32": (3, 5), "F16": (2, 3, 4), "BF16": (7,), "Q8_0": (5, 64)}.items():
        number = gguf.GGMLQuantizationType[kind]
        values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        writer.add_tensor(f"t.{kind}", gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_are_where_the_gguf_library_finds_them(written: Path) -> None:
    file = GGUFFile.open(written)

    content = written.read_bytes()
    for theirs in gguf.GGUFReader(written).tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.type == theirs.tensor_type.name
        assert content[ours.offset :][: ours.nbytes] == theirs.data.tobytes()


def test_metadata_is_what_the_gguf_library_reads(written: Path) -> None:
    theirs = {
        key: field.contents()
        for key, field in gguf.GGUFReader(written).fields.items()
        if not key.startswith("GGUF.")
    }

    assert GGUFFile.open(written).metadata == theirs


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    assert read(tmp_path, header([entry("k", 4, b"\1\0\0\0")], version=2)).metadata == {"k": 1}


def test_the_data_starts_at_the_files_own_alignment(tmp_path: Path) -> None:
    alignment = entry("general.alignment", 4, struct.pack("<I", 256))

    file = read(tmp_path, header([alignment], [tensor("t", [4])], data=512))

    assert file.tensors["t"] == TensorInfo("t", (4,), "F32", tmp_path / "a.gguf", 256, 16)


def test_a_type_we_do_not_multiply_with_is_still_named(tmp_path: Path) -> None:
    file = read(tmp_path, header(tensors=[tensor("t", [256, 2], kind=12)], data=288))

    assert (file.tensors["t"].type, file.tensors["t"].nbytes) == ("Q4_K", 288)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the magic number needs 4 bytes"),
    "another format": (b"PK\3\4" + bytes(60), "not a GGUF file: it begins with"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (header(version=1), "version 1 is not supported"),
    "version 4": (header(version=4), "version 4 is not supported"),
    "ends in the counts": (header()[:20], "the counts needs 8 bytes"),
    "absurd tensor count": (header(counts=(1 << 60, 0)), "claims 1152921504606846976 tensors"),
    "absurd entry count": (header(counts=(0, 1 << 60)), "metadata entries, more than"),
    "more tensors than bytes": (header(counts=(1000, 0)), "claims 1000 tensors, but has only"),
    "more entries than bytes": (header(counts=(0, 1000)), "claims 1000 metadata entries, but"),
    "absurd string": (
        header([struct.pack("<Q", 1 << 62) + bytes(9)]),
        "claims to be 4611686018427387904 bytes",
    ),
    "string behind the end": (
        header([struct.pack("<Q", 1 << 15) + bytes(9)]),
        "only .* more: it is truncated",
    ),
    "text that is no text": (header([entry("k", 8, string(b"\xff\xfe"))]), "is not UTF-8"),
    "absurd key": (header([entry("k" * (1 << 16), 4, bytes(4))]), "key claims to be 65536 bytes"),
    "duplicate key": (header([entry("k", 4, bytes(4))] * 2), "metadata key 'k' appears twice"),
    "unknown value type": (header([entry("k", 13, bytes(8))]), "unknown value type 13"),
    "unknown element type": (header([an_array(77, 0)]), "array of the unknown value type 77"),
    "array of arrays": (header([an_array(9, 1, bytes(12))]), "array of arrays"),
    "absurd array": (header([an_array(4, 1 << 40)]), "elements in metadata 'a', more than"),
    "array behind the end": (header([an_array(10, 1 << 20)]), "elements in metadata 'a', but has"),
    "strings behind the end": (header([an_array(8, 1 << 20)]), "elements in metadata 'a', but has"),
    "a boolean of 2": (header([entry("k", 7, b"\2")]), "neither 0 nor 1"),
    "an array of booleans of 2": (header([an_array(7, 2, b"\0\2")]), "neither 0 nor 1"),
    "alignment of 0": (header([entry("general.alignment", 4, bytes(4))]), "no power of two"),
    "alignment of 24": (
        header([entry("general.alignment", 4, struct.pack("<I", 24))]),
        "no power of two",
    ),
    "alignment in words": (
        header([entry("general.alignment", 8, string("32"))]),
        "no power of two",
    ),
    "duplicate tensor": (header(tensors=[tensor("t", [0])] * 2), "tensor 't' appears twice"),
    "five dimensions": (header(tensors=[tensor("t", [1] * 5)]), "5 dimensions, more than 4"),
    "absurd dimensions": (
        header(tensors=[string("t") + struct.pack("<I", 1 << 31) + bytes(64)]),
        "2147483648 dimensions",
    ),
    "absurd tensor": (header(tensors=[tensor("t", [1 << 63, 1 << 63])]), "absurdly large"),
    "tensor behind the end": (
        header(tensors=[tensor("t", [8])], data=31),
        "ends at byte .* truncated or damaged",
    ),
    "unknown tensor type": (header(tensors=[tensor("t", [1], kind=4)]), "unknown type number 4"),
    "offset not aligned": (header(tensors=[tensor("t", [1], offset=4)]), "not aligned to 32"),
    "half a block": (header(tensors=[tensor("t", [40], kind=2)]), "no whole number of Q4_0 blocks"),
    "overlap": (
        header(tensors=[tensor("t", [9]), tensor("u", [9], offset=32)], data=99),
        "'t' and 'u' overlap",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    content, says = DAMAGED[kind]

    with pytest.raises(CheckpointError, match=f"a.gguf: .*{says}"):
        read(tmp_path, content)


def test_a_file_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        GGUFFile.open(tmp_path / "missing.gguf")


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LargerThanItIs:
        st_size = 1 << 20
        st_mode = stat.S_IFREG

    monkeypatch.setattr("os.fstat", lambda _: LargerThanItIs)

    with pytest.raises(CheckpointError, match="the file shrank while the magic number"):
        read(tmp_path, b"GG")


def opens_or_refuses(path: Path) -> None:
    """Read the file; the only error may be ours, and memory must stay near the file's size."""
    tracemalloc.start()
    try:
        GGUFFile.open(path)
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < LIMIT_BYTES


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(content=st.binary(max_size=400))
def test_random_bytes_behind_the_magic_number_do_no_harm(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)

    opens_or_refuses(path)


@FUZZ
@given(
    place=st.floats(0, 1, exclude_max=True),
    value=st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 63, (1 << 64) - 1]),
    cut=st.floats(0, 1),
)
def test_a_number_changed_anywhere_does_no_harm(
    tmp_path: Path, written: Path, place: float, value: int, cut: float
) -> None:
    content = bytearray(written.read_bytes())
    content = content[: max(16, int(len(content) * cut))]
    at = int(place * (len(content) - 8))
    content[at : at + 8] = struct.pack("<Q", value)
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content)

    opens_or_refuses(path)


def test_every_prefix_of_a_file_is_refused(tmp_path: Path, written: Path) -> None:
    content = written.read_bytes()
    last = max(t.offset + t.nbytes for t in GGUFFile.open(written).tensors.values())

    for length in range(0, last, 7):
        with pytest.raises(CheckpointError):
            read(tmp_path, content[:length])


def test_opening_leaves_no_file_open(written: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())

    GGUFFile.open(written)

    assert {fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()} <= before


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_strings_that_lie_across_two_reads_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("cortex.models.checkpoints.gguf.BLOCK_BYTES", block_bytes)
    words = ["", "a", "größer", "x" * 100, "日本", ""] * 5

    file = read(tmp_path, header([an_array(8, len(words), b"".join(map(string, words)))]))

    assert file.metadata["a"] == words


def test_a_string_of_an_array_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    words = [string("good"), string(b"\xff\xfe"), string("good")]

    with pytest.raises(CheckpointError, match=r"metadata 'a' is not UTF-8"):
        read(tmp_path, header([an_array(8, 3, b"".join(words))]))


def test_a_string_of_an_array_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    words = [string("good"), struct.pack("<Q", 2**63), string("good")]

    with pytest.raises(CheckpointError, match="claims to be 9223372036854775808 bytes long"):
        read(tmp_path, header([an_array(8, 3, b"".join(words))]))


def test_the_limit_of_a_header_holds_within_an_array_of_strings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.models.checkpoints.gguf.MAX_HEADER_BYTES", 500)

    with pytest.raises(CheckpointError, match="larger than the 500 bytes"):
        read(tmp_path, header([an_array(8, 100, string("word") * 100)]))
