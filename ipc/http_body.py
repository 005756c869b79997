"""A request's body, read with a limit on everything: bytes, silence, and what it unpacks to.

    announced too large, or in an unknown encoding ─► refused before a byte is read
    no byte for BODY_PATIENCE_SECONDS              ─► 408
    more than MAX_BODY_BYTES, packed or unpacked   ─► 413, and nothing is unpacked beyond that

What is large is decoded in a thread, so that one body cannot hold up everybody's streams.

Compressed bodies are unpacked here and in a thread, so the server must leave them alone
(``auto_decompress=False``, which ``http_server.py`` sees to): aiohttp unpacks on the loop.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from cortex.ipc.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedEncoding
from cortex.ipc.node_api import MAX_BODY_BYTES

T = TypeVar("T")

BODY_PATIENCE_SECONDS = 30.0
LARGE_BYTES = 256 * 2**10

GZIP = b"\x1f\x8b"
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS
BARE_DEFLATE = -zlib.MAX_WBITS
PLAIN = frozenset({"", "identity"})
PACKED = frozenset({"gzip", "x-gzip", "deflate"})
TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB"


async def read_body(request: web.Request, patience_seconds: float = BODY_PATIENCE_SECONDS) -> bytes:
    """Return the body, unpacked.

    Raise BodyTooLarge, RequestTimeout, UnsupportedEncoding, or InvalidRequest where its framing or
    its compression makes no sense.
    """
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in PLAIN | PACKED:
        raise UnsupportedEncoding(
            f"Content-Encoding {encoding!r} is not read here: send gzip, deflate or none"
        )
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise BodyTooLarge(TOO_LARGE)
    body = await _read(request, patience_seconds)
    if encoding in PLAIN or not body:
        return body
    return await asyncio.to_thread(unpacked, body)


def unpacked(body: bytes, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Return what *body*, in gzip's or zlib's format or bare deflate, unpacks to; blocks.

    Raise InvalidRequest, or BodyTooLarge before more than *limit_bytes* are unpacked.
    """
    is_bare = not body.startswith(GZIP) and body[0] & 0xF != zlib.DEFLATED
    unpacking = zlib.decompressobj(BARE_DEFLATE if is_bare else ZLIB_OR_GZIP)
    try:
        whole = unpacking.decompress(body, limit_bytes + 1)
    except zlib.error as exc:
        raise InvalidRequest(f"the body is not in the encoding that it announces: {exc}") from exc
    if len(whole) > limit_bytes:
        raise BodyTooLarge(f"{TOO_LARGE} when it is unpacked")
    if not unpacking.eof:
        raise InvalidRequest("the compressed body ends too early")
    if unpacking.unused_data:  # a million empty members, say
        raise InvalidRequest("the compressed body goes on after its end")
    return whole


async def decoded(body: bytes, decode: Callable[[bytes], T], large_bytes: int = LARGE_BYTES) -> T:
    """Return ``decode(body)``, made in a thread where *body* is large; raise what it raises."""
    if len(body) < large_bytes:
        return decode(body)
    return await asyncio.to_thread(decode, body)


async def _read(request: web.Request, patience_seconds: float) -> bytes:
    body = bytearray()
    try:
        while True:
            async with asyncio.timeout(patience_seconds):
                chunk = await request.content.readany()
            if not chunk:
                return bytes(body)
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise BodyTooLarge(TOO_LARGE)
    except TimeoutError as exc:
        raise RequestTimeout(f"no byte of the body came for {patience_seconds:g} seconds") from exc
    except web.RequestPayloadError as exc:
        raise InvalidRequest(f"the body cannot be read: {exc}") from exc
