"""What a request adds to its logits, and takes from those of tokens that were there before.

With x the logit of a token, c how often the answer has it so far, in this order:

    logit_bias               x + bias
    repetition_penalty r     x / r where x > 0, else x * r      tokens of prompt and answer
    frequency_penalty f      x - f c                            tokens of the answer
    presence_penalty p       x - p where c > 0                  tokens of the answer

The second is Keskar et al.'s (arXiv:1909.05858) in the form that keeps a penalty one for negative
logits too, the others are OpenAI's. The counts are the sequence's (token_counts.py). Only the
logits of the tokens concerned are touched.

Shapes: R rows, V vocabulary, N different tokens of each row, those of all rows laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.cuda import upload
from cortex.runtime.device.row import Row, is_penalised

LARGEST = 1e30
"""The largest bias or penalty. No model's logits come near, and in float64 nothing made of them
overflows."""


def adjust(logits: Tensor, rows: Sequence[Row]) -> None:
    """Change *logits*, [R, V] float64, in place as the *rows* ask."""
    _add_bias(logits, rows)
    _penalise(logits, rows)


def _add_bias(logits: Tensor, rows: Sequence[Row]) -> None:
    biases = [row.sampling.logit_bias for row in rows]
    if any(biases):
        spots = _spots([list(bias) for bias in biases], logits)
        logits[spots] += _numbers([x for bias in biases for x in bias.values()], logits)


def _penalise(logits: Tensor, rows: Sequence[Row]) -> None:
    counts = [row.counts if is_penalised(row.sampling) else None for row in rows]
    if not any(of_row and of_row.ids for of_row in counts):
        return
    spots = _spots([of_row.ids if of_row else [] for of_row in counts], logits)
    c = _numbers(np.concatenate([of_row.counts for of_row in counts if of_row]), logits)

    def of_rows(value: Callable[[SamplingParams], float]) -> Tensor:
        return _numbers([value(row.sampling) for row in rows], logits)[spots[0]]

    x = logits[spots]  # [N]
    penalty = of_rows(lambda sampling: sampling.repetition_penalty)
    x = torch.where(x > 0, x / penalty, x * penalty)
    frequency = of_rows(lambda sampling: sampling.frequency_penalty)
    presence = of_rows(lambda sampling: sampling.presence_penalty)
    logits[spots] = torch.where(c > 0, x - frequency * c - presence, x)


def _spots(ids: Sequence[Sequence[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns, [N] each, of the *ids* of each row."""
    columns = np.concatenate([np.array(row_ids, dtype=np.int64) for row_ids in ids])
    rows = np.repeat(np.arange(len(ids)), [len(row_ids) for row_ids in ids])
    of_row, of_column = upload(np.stack([rows, columns]), torch.int64, logits.device)
    return of_row, of_column


def _numbers(values: Sequence[float] | np.ndarray, like: Tensor) -> Tensor:
    return upload(values, like.dtype, like.device)
