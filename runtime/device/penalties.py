"""What a request adds to its logits, and takes from those of tokens that were there before.

With x the logit of a token, c how often the answer has it so far, in this order:

    logit_bias               x + bias
    repetition_penalty r     x / r where x > 0, else x * r      tokens of prompt and answer
    frequency_penalty f      x - f c                            tokens of the answer
    presence_penalty p       x - p where c > 0                  tokens of the answer

The second is Keskar et al.'s (arXiv:1909.05858) in the form that keeps a penalty one for negative
logits too, the others are OpenAI's. Counts are made anew from the tokens of each sequence, so that
it does not matter how often it was computed. Only the logits of the tokens concerned are touched.

Shapes: R rows, V vocabulary, N different tokens of each row, those of all rows laid end to end.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.row import Row

LARGEST = 1e30
"""The largest bias or penalty. No model's logits come near, and in float64 nothing made of them
overflows."""


def adjust(logits: Tensor, rows: Sequence[Row]) -> None:
    """Change *logits*, [R, V] float64, in place as the *rows* ask."""
    _add_bias(logits, rows)
    _divide_repeated(logits, rows)
    _subtract_counted(logits, rows)


def _add_bias(logits: Tensor, rows: Sequence[Row]) -> None:
    spots = _spots([row.sampling.logit_bias for row in rows], logits)
    if spots is not None:
        bias = [value for row in rows for value in row.sampling.logit_bias.values()]
        logits[spots] += _numbers(bias, logits)


def _divide_repeated(logits: Tensor, rows: Sequence[Row]) -> None:
    repeated = [set(row.known) if row.sampling.repetition_penalty != 1 else () for row in rows]
    spots = _spots(repeated, logits)
    if spots is not None:
        penalty = _of_rows(rows, spots, logits, lambda sampling: sampling.repetition_penalty)
        x = logits[spots]  # [N]
        logits[spots] = torch.where(x > 0, x / penalty, x * penalty)


def _subtract_counted(logits: Tensor, rows: Sequence[Row]) -> None:
    counts = [Counter(row.answer if _counts(row.sampling) else ()) for row in rows]
    spots = _spots(counts, logits)
    if spots is not None:
        c = _numbers([count for of_row in counts for count in of_row.values()], logits)
        frequency = _of_rows(rows, spots, logits, lambda sampling: sampling.frequency_penalty)
        presence = _of_rows(rows, spots, logits, lambda sampling: sampling.presence_penalty)
        logits[spots] = logits[spots] - frequency * c - presence


def _counts(sampling: SamplingParams) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _spots(ids: Sequence[Iterable[int]], logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return rows and columns, [N] each, of the *ids* of each row; None where there are none."""
    rows, columns = array("q"), array("q")
    for row, row_ids in enumerate(ids):
        columns.extend(row_ids)
        rows.extend([row] * (len(columns) - len(rows)))
    if not columns:
        return None
    index = torch.stack([torch.frombuffer(part, dtype=torch.int64) for part in (rows, columns)])
    of_row, of_column = index.to(logits.device)
    return of_row, of_column


def _of_rows(
    rows: Sequence[Row],
    spots: tuple[Tensor, Tensor],
    logits: Tensor,
    value: Callable[[SamplingParams], float],
) -> Tensor:
    """Return the *value* of each spot's row, [N]."""
    return _numbers([value(row.sampling) for row in rows], logits)[spots[0]]


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)
