"""The sampler in plain Python and float64, one row and one token after the other."""

from __future__ import annotations

import math

from cortex.runtime.device.philox import uniform
from cortex.runtime.device.row import Row


def adjusted(logits: list[float], row: Row) -> list[float]:
    """Return what bias and penalties make of *logits*."""
    sampling = row.sampling
    counts = dict(zip(row.counts.ids, row.counts.counts, strict=True)) if row.counts else {}
    changed = []
    for token, logit in enumerate(logits):
        x = logit + sampling.logit_bias.get(token, 0.0)
        if token in counts:
            r = sampling.repetition_penalty
            x = x / r if x > 0 else x * r
        x -= sampling.frequency_penalty * counts.get(token, 0)
        x -= sampling.presence_penalty if counts.get(token) else 0.0
        changed.append(x if is_allowed(row, token) else -math.inf)
    return changed


def is_allowed(row: Row, token: int) -> bool:
    """Whether the row's mask lets it choose *token*."""
    return row.allowed is None or bool(int(row.allowed[token // 32]) >> token % 32 & 1)


def chosen(logits: list[float], row: Row) -> int | None:
    """Choose as the sampler says that it does; None where nothing is allowed."""
    if row.forced is not None:
        return row.forced
    sampling = row.sampling
    logits = adjusted(logits, row)
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if logits[ids[0]] == -math.inf:
        return None
    if sampling.temperature == 0:
        return ids[0]
    shares = [math.exp((x - logits[ids[0]]) / sampling.temperature) for x in logits]
    weights = [int(share * 2**40) if share >= sampling.min_p else 0 for share in shares]
    ids = ids[: sampling.top_k or None]
    mark, before, kept = sampling.top_p * sum(weights[i] for i in ids), 0, list[int]()
    for i in ids:
        if before < mark:
            kept.append(i)
        before += weights[i]
    left = uniform(sampling.seed, row.position) * sum(weights[i] for i in kept)
    for i in sorted(kept):
        left -= weights[i]
        if left < 0:
            return i
    return max(kept)


def logprobs(logits: list[float]) -> list[float]:
    """Return the log-softmax."""
    largest = max(logits)
    total = math.log(math.fsum(math.exp(x - largest) for x in logits)) + largest
    return [x - total for x in logits]
