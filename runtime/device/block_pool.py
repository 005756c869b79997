"""Who owns which block of the paged KV cache. Numbers only, no memory and no torch."""

from __future__ import annotations


class BlockPool:
    """Blocks ``0 .. total-1`` of ``block_tokens`` positions; each is free or has one owner."""

    def __init__(self, total: int, block_tokens: int) -> None:
        self.total = total
        self.block_tokens = block_tokens
        self._free = list(reversed(range(total)))
        self._is_taken = bytearray(total)

    @property
    def free(self) -> int:
        """How many blocks nobody owns."""
        return len(self._free)

    @property
    def tokens(self) -> int:
        """How many positions all blocks hold."""
        return self.total * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold *tokens* positions."""
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> list[int] | None:
        """Return *count* blocks, the caller's from now on, or None where fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_taken[block] = True
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Free *blocks*, which the caller took."""
        for block in blocks:
            assert self._is_taken[block], f"block {block} has no owner"
            self._is_taken[block] = False
        self._free.extend(blocks)
