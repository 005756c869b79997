"""What is not a request of HTTP, or not one that a server must serve, and what to say to it.

Both daemons are held to this table. ``{path}`` is a POST route of theirs.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass

from cortex.ipc.node_api import MAX_BODY_BYTES
from raw_http import head

INVALID = (400, "invalid_request")
TOO_LARGE = (413, "body_too_large")
CHUNKED = "Transfer-Encoding: chunked"


@dataclass(frozen=True)
class Bad:
    """A request on the wire."""

    name: str
    sent: bytes
    refusal: tuple[int, str]
    is_closed_after: bool = True
    """Whether the connection cannot go on; else the next request on it must be served."""


def bad_http(path: str) -> list[Bad]:
    """Return the table."""
    large = f"Content-Length: {MAX_BODY_BYTES + 1}"
    return [
        Bad("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), INVALID),
        Bad("words", b"hello there\r\n\r\n", INVALID),
        Bad("http 2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", INVALID),
        Bad("http 9.9", b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n", INVALID),
        Bad("header without a colon", head("GET", "/health", "nothing"), INVALID),
        Bad("header with a NUL", head("GET", "/health", "X-A: \0"), INVALID),
        Bad("header with a line feed", head("GET", "/health", "X-A: a\nb"), INVALID),
        Bad("header with a space", head("GET", "/health", "X A: a"), INVALID),
        Bad("200 headers", head("GET", "/health", *(f"X-{i}: 1" for i in range(200))), INVALID),
        Bad("a header of 100 kB", head("GET", "/health", "X-A: " + "a" * 100_000), INVALID),
        Bad("a header's name of 100 kB", head("GET", "/health", "a" * 100_000 + ": 1"), INVALID),
        Bad("a path of 100 kB", head("GET", "/" + "a" * 100_000), INVALID),
        Bad("a path with a NUL", head("GET", "/a\0b"), INVALID),
        Bad("negative length", head("POST", path, "Content-Length: -1"), INVALID),
        Bad("length in words", head("POST", path, "Content-Length: two"), INVALID),
        Bad("a huge length", head("POST", path, "Content-Length: " + "9" * 40), INVALID),
        Bad(
            "two lengths",
            head("POST", path, "Content-Length: 2", "Content-Length: 3") + b"{}",
            INVALID,
        ),
        Bad("length and chunks", head("POST", path, "Content-Length: 2", CHUNKED) + b"{}", INVALID),
        Bad("unknown transfer", head("POST", path, "Transfer-Encoding: telepathy"), INVALID),
        Bad(
            "chunk without a size", head("POST", path, CHUNKED) + b"zz\r\n{}\r\n0\r\n\r\n", INVALID
        ),
        Bad("chunk of a huge size", head("POST", path, CHUNKED) + b"f" * 40 + b"\r\n{}", INVALID),
        Bad(
            "chunk longer than it says",
            head("POST", path, CHUNKED) + b"1\r\n{}\r\n0\r\n\r\n",
            INVALID,
        ),
        Bad("length too short", head("POST", path, "Content-Length: 1") + b"{}", INVALID),
        Bad(
            "expectation",
            head("POST", path, "Expect: 200-maybe", "Content-Length: 2") + b"{}",
            (417, "expectation_failed"),
            is_closed_after=False,
        ),
        Bad(
            "expectation of an unknown path",
            head("POST", "/nowhere", "Expect: 200-maybe", "Content-Length: 2") + b"{}",
            (417, "expectation_failed"),
            is_closed_after=False,
        ),
        *(
            Bad(
                f"in {encoding}",
                head("POST", path, f"Content-Encoding: {encoding}", "Content-Length: 2") + b"{}",
                (415, "unsupported_encoding"),
                is_closed_after=False,
            )
            for encoding in ("br", "zstd", "compress", "gzip, gzip", "\xff")
        ),
        Bad(
            "not in gzip",
            head("POST", path, "Content-Encoding: gzip", "Content-Length: 2") + b"{}",
            INVALID,
            is_closed_after=False,
        ),
        Bad(
            "a body over the limit",
            head("POST", path, large) + bytes(MAX_BODY_BYTES + 1),
            TOO_LARGE,
            is_closed_after=False,
        ),
        Bad(
            "chunks over the limit",
            head("POST", path, CHUNKED) + b"100000\r\n%s\r\n" % bytes(2**20) * 33 + b"0\r\n\r\n",
            TOO_LARGE,
            is_closed_after=False,
        ),
        Bad(
            "a bomb",
            _packed(path, gzip.compress(bytes(4 * MAX_BODY_BYTES), 9)),
            TOO_LARGE,
            is_closed_after=False,
        ),
    ]


def _packed(path: str, body: bytes) -> bytes:
    return head("POST", path, "Content-Encoding: gzip", f"Content-Length: {len(body)}") + body
