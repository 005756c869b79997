"""Compressed bodies are unpacked as far as we would read them, and no further."""

import gzip
import threading
import zlib

import pytest

from cortex.ipc.errors import BodyTooLarge, InvalidRequest
from cortex.ipc.http_body import LARGE_BYTES, decoded, unpacked

SAID = b'{"model": "m"}' * 100


GZIPPED = gzip.compress(SAID, mtime=0)
"""Without the time, which would be in the names of tests."""


def bare(data: bytes) -> bytes:
    packing = zlib.compressobj(wbits=-15)
    return packing.compress(data) + packing.flush()


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, bare])
def test_each_format_is_unpacked(pack: type[bytes]) -> None:
    assert unpacked(pack(SAID)) == SAID


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, bare])
def test_a_bomb_is_unpacked_only_to_the_limit(pack: type[bytes]) -> None:
    with pytest.raises(BodyTooLarge):
        unpacked(pack(bytes(101)), limit_bytes=100)

    assert unpacked(pack(bytes(100)), limit_bytes=100) == bytes(100)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\x78{}", "not in the encoding"),
        (GZIPPED[:-9], "ends too early"),
        (b"\x1f", "not in the encoding"),
        (b"\x1f\x8b", "ends too early"),
        (GZIPPED[:-8] + bytes(8), "not in the encoding"),
        (GZIPPED + gzip.compress(b"", mtime=0), "after its end"),
        (zlib.compress(SAID) + b"x", "after its end"),
    ],
)
def test_what_is_not_a_whole_packed_body_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        unpacked(body)


@pytest.mark.parametrize(("size", "is_here"), [(LARGE_BYTES - 1, True), (LARGE_BYTES, False)])
async def test_a_large_body_is_decoded_in_a_thread(size: int, is_here: bool) -> None:
    thread = await decoded(bytes(size), lambda _: threading.get_ident())

    assert (thread == threading.get_ident()) == is_here
