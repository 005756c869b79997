"""Which session a request belongs to, and which replica is that session's home; pure.

The prompts of a session begin alike: where the last one has been computed the next one is cheap.

    a session is known by                               who reads it
    a header of SESSION_HEADERS                         ``named_in_headers``
    prompt_cache_key, Claude Code's metadata.user_id    ``named_in_body``
    the head of the conversation, hashed: its turns up
    to the first of the user, which all its requests
    repeat                                              ``head_of``

A ``previous_response_id`` is new in every request; the dialect that keeps what is behind it hashes
the head of that. An end user's id is no session: many conversations may have the same.

Its home is the replica with the highest hash of session and name (rendezvous hashing, Thaler and
Ravishankar 1998), so that a node that comes or goes moves only its own sessions. A home that is
busier than the others by more than a factor passes them on to the next in that order (bounded load,
arXiv:1608.01350): a prompt computed twice costs less than a queue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

SESSION_HEADERS = (
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "x-session-affinity",
    "x-session-id",
)
IN_USER_ID = re.compile(r"_session_([\w-]+)\Z|\"session_id\"\s*:\s*\"([^\"]+)\"")
"""Claude Code's: ``user_…_session_<id>``, or an object as text."""


@dataclass(frozen=True)
class Session:
    """A session, and how many times the mean load its home may have before it goes elsewhere."""

    key: str
    load_factor: float

    def rank(self, node: str) -> bytes:
        """Return how much it likes *node*: it is at home where this is highest."""
        return blake2b(f"{self.key}\0{node}".encode(), digest_size=8).digest()

    def is_too_busy(self, load: float, loads: Sequence[int]) -> bool:
        """Whether a replica with *load* is too busy for it; never true of all whose *loads* are."""
        return load > self.load_factor * sum(loads) / len(loads) + 1


def session_of(
    key_id: str | None, headers: Mapping[str, str], affinity: str | None, load_factor: float
) -> Session | None:
    """Return the session of a request whose body says *affinity*; None: nothing repeats.

    The caller's key is part of it, so that nobody can join the sessions of others.
    """
    name = named_in_headers(headers) or affinity
    if name is None:
        return None
    said = f"{key_id or ''}\0{name}".encode(errors="surrogatepass")
    return Session(blake2b(said, digest_size=16).hexdigest(), load_factor)


def named_in_headers(headers: Mapping[str, str]) -> str | None:
    """Return the session that a client names in its headers, or None."""
    return next((headers[name] for name in SESSION_HEADERS if headers.get(name)), None)


def named_in_body(prompt_cache_key: Any = None, metadata: Any = None) -> str | None:
    """Return the session that these fields of a body name, whatever stands in them, or None."""
    if isinstance(prompt_cache_key, str) and prompt_cache_key:
        return prompt_cache_key
    user_id = metadata.get("user_id") if isinstance(metadata, dict) else None
    found = IN_USER_ID.search(user_id) if isinstance(user_id, str) else None
    return next(filter(None, found.groups())) if found else None


def head_of(turns: Iterable[Any]) -> str | None:
    """Return the hash of the head of *turns*: as JSON (``msgspec.Raw``), or decoded.

    Where the user says nothing it is the first turn; None where there is no turn.
    """
    digest, first = blake2b(digest_size=16), None
    for turn in turns:
        as_json = turn if isinstance(turn, msgspec.Raw) else msgspec.json.encode(turn)
        digest.update(as_json)
        if _is_of_user(as_json):
            return digest.hexdigest()
        first = first or digest.hexdigest()
    return first


def head_of_text(text: memoryview) -> str:
    """Return the hash of how a prompt begins that has no turns: text, or token ids."""
    return blake2b(text[:PLAIN_HEAD_BYTES], digest_size=16).hexdigest()


PLAIN_HEAD_BYTES = 1024


class _Turn(msgspec.Struct):
    role: Any = None


_TURN = msgspec.json.Decoder(_Turn)


def _is_of_user(turn: bytes | msgspec.Raw) -> bool:
    try:
        return bool(_TURN.decode(turn).role == "user")
    except msgspec.ValidationError:  # no object; the node will say so
        return False
