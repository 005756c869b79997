"""Tokens chosen from rows of logits by the compiled kernels: sampling.c, called through ctypes.

To each row applies, in this order, what its ``pack`` says:

    health               a NaN or an infinity: UNHEALTHY
    scores               of the logits as they are: what log probabilities are made of
    a forced token       nothing below applies to it
    allowed tokens       all others cannot be chosen; STUCK where there are none
    bias, repetition, frequency and presence penalty, on the tokens named, in float64
    at temperature 0     the likeliest, the lowest id of equals
    temperature, min_p, top_k, top_p, and the draw at Philox's number for (seed, position)

Shapes: R rows, V vocabulary, S of the rows scored, K likeliest tokens.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cortex.models.kernels.cpu import CpuKernels

UNHEALTHY, STUCK = -1, -2
"""In place of a token, as in sampling.c: the logits were not finite; nothing was allowed."""

_ASKED = struct.Struct("@6d2Q5Q6i")  # Asked in sampling.c
_NOTHING, _NO_NUMBERS = array("i"), array("d")
_MASK = 2**64 - 1
_MOST_THREADS = 16  # each has memory for a row


_LIKELIEST_OF_ALL = _ASKED.pack(*(0.0, 1.0, 0.0, 1.0, 0.0, 0.0), *(0,) * 7, *(0, 0, 0, -1, -1, 0))
"""What most rows ask for: the likeliest token, and nothing else."""


class Scores(NamedTuple):
    """Of scored rows: the chosen token and then the likeliest, their logits, and all of the rest.

    ``totals`` are the sums of exp(x - largest) over the vocabulary, in units of 2**-44 and each
    cut to a whole number.
    """

    ids: Tensor  # [S, 1 + K] int64
    logits: Tensor  # [S, 1 + K] float32
    totals: Tensor  # [S] int64
    largest: Tensor  # [S] float32


class Asks:
    """How rows are chosen from, one after the other, as the kernels read it."""

    def __init__(self, rows: int) -> None:
        self._packed = bytearray(rows * _ASKED.size)
        self._rows = 0
        self._scored = 0
        self._likeliest = 0
        self._mask_words = 2**31
        self._alive: list[object] = []  # what the kernels only have the address of

    def add(
        self,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        position: int = 0,
        forced: int | None = None,
        allowed: Tensor | None = None,
        bias: Mapping[int, float] | None = None,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        known: tuple[array[int], array[int]] | None = None,
        likeliest: int | None = None,
    ) -> None:
        """Ask for one more row.

        ``known`` are different tokens that were there before, and how often each is in the answer;
        int32, at most V of them. ``likeliest`` asks for scores, with so many of the likeliest.
        """
        known_ids, counts = known or (_NOTHING, _NOTHING)
        bias_ids, biases = _NOTHING, _NO_NUMBERS
        if bias:
            bias_ids, biases = array("i", bias), array("d", bias.values())
        if allowed is not None:
            allowed = allowed.contiguous()
            assert allowed.dtype == torch.int32, "a bit each"
            assert allowed.device.type == "cpu", "it is read on the host"
            self._mask_words = min(self._mask_words, allowed.numel())
        self._alive += (allowed, bias_ids, biases, known_ids, counts)
        _ASKED.pack_into(
            self._packed,
            self._rows * _ASKED.size,
            *(temperature, top_p, min_p, repetition, frequency, presence),
            *(seed & _MASK, position & _MASK),
            0 if allowed is None else allowed.data_ptr(),
            *(values.buffer_info()[0] for values in (bias_ids, biases, known_ids, counts)),
            *(len(bias_ids), len(known_ids), top_k, -1 if forced is None else forced),
            *(-1 if likeliest is None else self._scored, likeliest or 0),
        )
        self._rows += 1
        if likeliest is not None:
            self._scored += 1
            self._likeliest = max(self._likeliest, likeliest)

    def add_likeliest(self) -> None:
        """Ask for the likeliest token of one more row: ``add`` with nothing said."""
        at = self._rows * _ASKED.size
        self._packed[at : at + _ASKED.size] = _LIKELIEST_OF_ALL
        self._rows += 1

    def choose(self, kernels: CpuKernels, logits: Tensor) -> tuple[Tensor, Scores | None]:
        """[R, V] float32 -> [R] int64 tokens, and scores where any row asks for them."""
        logits = logits.contiguous()
        count, vocab_size = logits.shape
        assert count == self._rows, "each row is asked for"
        assert logits.dtype == torch.float32
        assert self._mask_words * 32 >= vocab_size, "a mask has a bit for every token"
        tokens = torch.empty(count, dtype=torch.int64)
        scores = self._new_scores(min(self._likeliest, vocab_size)) if self._scored else None
        packed = (ctypes.c_char * len(self._packed)).from_buffer(self._packed)
        failed = kernels.library.cortex_choose(
            *(ctypes.addressof(packed), logits.data_ptr(), count, vocab_size, tokens.data_ptr()),
            *((scores.ids.data_ptr(), scores.logits.data_ptr()) if scores else (None, None)),
            *((scores.totals.data_ptr(), scores.largest.data_ptr()) if scores else (None, None)),
            *(scores.ids.size(1) - 1 if scores else 0, min(torch.get_num_threads(), _MOST_THREADS)),
        )
        if failed:
            raise MemoryError("no memory to choose tokens with")
        return tokens, scores

    def _new_scores(self, likeliest: int) -> Scores:
        return Scores(
            ids=torch.zeros(self._scored, 1 + likeliest, dtype=torch.int64),
            logits=torch.zeros(self._scored, 1 + likeliest),
            totals=torch.ones(self._scored, dtype=torch.int64),
            largest=torch.zeros(self._scored),
        )
