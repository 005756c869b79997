"""How the ranks of a tensor-parallel group share a model (Shoeybi et al., arXiv:1909.08053).

A matrix that follows the residual stream is split by its outputs (column parallel), the one that
leads back to it by its inputs (row parallel), so a block of attention or MLP needs one sum over the
ranks. Embedding and head are split by the vocabulary. Key-value heads of which there are fewer than
ranks are held by several. The inner dimension of an MLP or an expert is cut between the blocks of
its weights, so that the first ranks may hold a block more than the others.

``Cut`` says which part of a checkpoint's tensor a rank holds; everything that loads or prices a
rank asks the same cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cortex.models.checkpoints.inner_blocks import inner_range


class Collectives(Protocol):
    """What ranks do together; every rank calls the same, in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum contiguous *x* over the ranks, in place, and return it; the same bits on all."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[M, n] of every rank -> [M, n * ranks], in the order of the ranks."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a dimension of *of* elements that a rank holds: [first, end) of each range."""

    of: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, size: int) -> Cut:
        """Return all of *size*."""
        return cls(size, ((0, size),))

    @property
    def size(self) -> int:
        """How many elements it is."""
        return sum(end - first for first, end in self.ranges)

    @property
    def is_whole(self) -> bool:
        """Whether it is everything, in order."""
        return self.ranges == ((0, self.of),)


@dataclass(frozen=True, slots=True)
class Group:
    """The rank that holds a model, among how many; without *collectives* it can only be loaded."""

    rank: int = 0
    ranks: int = 1
    collectives: Collectives | None = None
    block: int = 1
    """Elements of an inner dimension that stay together (``checkpoints.inner_blocks``)."""

    def share(self, size: int) -> Cut:
        """Return this rank's even part of *size*; raise ValueError where it does not divide."""
        return self.shares(size)

    def shares(self, *sizes: int) -> Cut:
        """Return the even part of each of *sizes*, which follow each other in one tensor."""
        ranges, first = [], 0
        for size in sizes:
            if size % self.ranks:
                raise ValueError(f"{size} does not divide among {self.ranks} ranks")
            part = size // self.ranks
            ranges.append((first + self.rank * part, first + (self.rank + 1) * part))
            first += size
        return Cut(first, tuple(ranges)) if self.ranks > 1 else Cut.whole(first)

    def inner(self, size: int) -> Cut:
        """Return this rank's part of the *size* inner elements of an MLP or of an expert.

        Raise ValueError where they do not divide.
        """
        return Cut(size, (inner_range(size, self.block, self.rank, self.ranks),))

    def share_where_even(self, size: int) -> Cut:
        """Return this rank's part of *size*, all of it where it does not divide."""
        return self.share(size) if size % self.ranks == 0 else Cut.whole(size)

    def query_heads(self, heads: int, head_dim: int) -> Cut:
        """Return the part of *heads* query heads; raise ValueError where they do not divide."""
        if heads % self.ranks:
            raise ValueError(f"{heads} query heads do not divide among {self.ranks} ranks")
        return self.share(heads * head_dim)

    def heads(self, heads: int, head_dim: int) -> Cut:
        """Return the part of *heads* key-value heads: of fewer than ranks the one that is read."""
        if heads >= self.ranks or self.ranks % heads:
            if heads % self.ranks:
                raise ValueError(f"{heads} key-value heads do not divide among {self.ranks} ranks")
            return self.share(heads * head_dim)
        head = self.rank * heads // self.ranks
        return Cut(heads * head_dim, ((head * head_dim, (head + 1) * head_dim),))

    def count(self, heads: int) -> int:
        """How many of *heads* this rank has."""
        return max(1, heads // self.ranks)


ALONE = Group()
