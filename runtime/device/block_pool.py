"""Who owns which block of the paged KV cache, and which blocks hold the head of a known prompt.

A block is one of these:

    state    owners   what it holds is known   taken by a sequence
    free     0        no                       first
    cached   0        yes                      when no free one is left; least recently used first
    used     1 ...    where it is full         by those whose prompt begins the same

A full block is known by a key: a hash of its tokens and of the key of the block before it, so equal
keys mean equal heads (as in vLLM's prefix caching; BLAKE2b, 128 bits: no prompt can be made up to
find another's). Of two blocks with one key the second stays unknown, and is free when it is given
back. Numbers only: no memory and no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile

_KEY_BYTES = 16


def block_key(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of a block of *token_ids* that follows the block of key *before*."""
    return blake2b(before + array("i", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Blocks ``0 .. total-1`` of ``block_tokens`` positions."""

    def __init__(self, total: int, block_tokens: int) -> None:
        self.total = total
        self.block_tokens = block_tokens
        self._free = list(reversed(range(total)))
        self._cached: dict[int, None] = {}  # the least recently used first
        self._owners = [0] * total
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """How many blocks nobody owns: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """How many blocks nobody owns and the next prompt may find."""
        return len(self._cached)

    @property
    def tokens(self) -> int:
        """How many positions all blocks hold."""
        return self.total * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold *tokens* positions."""
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> list[int] | None:
        """Return *count* blocks, the caller's from now on, or None where fewer are free."""
        if count > self.free:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def known(self, keys: Iterable[bytes]) -> int:
        """Return of how many of the first *keys* the blocks are known."""
        return sum(1 for _ in takewhile(self._block_of.__contains__, keys))

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the first *keys* as far as they are known, now the caller's too."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._cached.pop(block, None)
            self._owners[block] += 1
            blocks.append(block)
        return blocks

    def give_back(self, blocks: Sequence[int]) -> None:
        """Own *blocks* no more; of those nobody owns then, the last are the first to be reused."""
        for block in reversed(blocks):
            assert self._owners[block], f"block {block} has no owner"
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def remember(self, block: int, key: bytes) -> None:
        """Note what the used *block* holds; it is written no more."""
        assert self._owners[block], f"block {block} has no owner"
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let no further prompt find the blocks that are known by *keys*."""
        for key in keys:
            block = self._block_of.pop(key, None)
            if block is None:
                continue
            del self._key_of[block]
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def clear(self) -> int:
        """Forget what all blocks hold, and return how many were known."""
        known = list(self._block_of)
        self.forget(known)
        return len(known)

    def _evict(self) -> int:
        block = next(iter(self._cached))
        del self._cached[block]
        del self._block_of[self._key_of.pop(block)]
        return block
