"""The next token of every row of logits. A row's token depends on that row alone.

What applies to a row, in this order; at temperature 0 the likeliest is taken after 6:

    1   health                 a NaN or an infinity: no token
    2   logprobs               of the logits as they are                         logprobs.py
    3   a token put in         nothing below applies to it                       reasoning_block.py
    4   allowed tokens         no other can be chosen; where there are none: no token
    5   logit_bias             is added                                          penalties.py
    6   repetition, frequency  take from tokens that were there before           penalties.py
        and presence penalty
    7   temperature            divides                                           shares.py
    8   min_p                  keeps p >= min_p * the likeliest token's p
    9   top_k                  keeps the k largest, of equals the lowest ids
    10  top_p                  keeps the nucleus, with the token that crosses the mark
    11  the draw               at one uniform number per (seed, position)        philox.py

The order is vLLM's. transformers, too, penalises, divides, then filters, but with top_p before
min_p; llama.cpp also begins with the bias and the penalties, but divides last. min_p is Nguyen et
al.'s (arXiv:2407.01082), the nucleus Holtzman et al.'s (arXiv:1904.09751). The draw inverts the
cumulative distribution in order of token ids.

Probabilities are turned into whole numbers, in units of 2**-40 of the likeliest token's, before
anything is summed. Sums of whole numbers do not depend on the order of summation; what comes before
is float64, in single operations that every device rounds alike. So the same logits give the same
token: in one row or forty, with any number of threads, on this device or another, and by either of
the two ways that there are, the compiled one of a CPU (models/kernels/sampling.c) and plain torch,
which serves GPUs and where there is no compiler.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.models.kernels.cpu import CpuKernels, kernels_for
from cortex.models.kernels.sampling import STUCK, UNHEALTHY, Asks, Scores
from cortex.runtime.device.cuda import upload
from cortex.runtime.device.logprobs import score, told
from cortex.runtime.device.penalties import adjust
from cortex.runtime.device.philox import uniform
from cortex.runtime.device.row import Chosen, Row
from cortex.runtime.device.shares import rate, shares

_UNIT = 2.0**40  # 2**18 tokens of the likeliest one's weight still sum to less than 2**63
_ROWS_AT_ONCE = 8
_LIKELIEST = 1024  # finding so many of 49,152 takes a CPU 0.4 ms, sorting all of them 2.9 ms
_BYTES_PER_LOGIT = 96


def sampling_bytes(rows: int, vocab_size: int) -> int:
    """Return a bound of the memory that ``sample`` takes beside the logits, and of the logits.

    It is plain torch's; each of the compiled operation's up to 16 threads takes 26 bytes a logit.
    """
    return vocab_size * (rows * 8 + min(rows, _ROWS_AT_ONCE) * _BYTES_PER_LOGIT)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen from rows of logits, on their device, which may still be at it."""

    tokens: Tensor
    """[R] int64; below 0 where there is none."""
    scores: Scores | None
    scored: dict[int, int]
    """The rows of the scores, and how many of the likeliest each wants."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that the host has to see of it."""
        return [self.tokens, *(self.scores or ())]

    def read(self, tensors: Sequence[Tensor]) -> list[Chosen]:
        """Return what each row chose, from ``tensors`` on the host."""
        tokens, *parts = tensors
        found = [Chosen(token) if token >= 0 else _NONE[token] for token in tokens.tolist()]
        if parts:
            scored = told(Scores(*parts), list(self.scored.values()))
            for row, chosen in zip(self.scored, scored, strict=True):
                if found[row].token_id is not None:
                    found[row] = chosen
        return found


_NONE = {UNHEALTHY: Chosen(None), STUCK: Chosen(None, is_stuck=True)}


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """[R, V] float32 -> R tokens; none for a row that has a NaN or an infinity in it."""
    choice = choose(logits, rows)
    return choice.read([tensor.cpu() for tensor in choice.tensors])


def choose(logits: Tensor, rows: Sequence[Row]) -> Choice:
    """[R, V] float32 -> R tokens. On a GPU all of it is only queued: nothing is waited for."""
    kernels = kernels_for(logits)
    if kernels is None:
        return choose_by_torch(logits, rows)
    return choose_by_kernels(kernels, logits, rows)


def choose_by_kernels(kernels: CpuKernels, logits: Tensor, rows: Sequence[Row]) -> Choice:
    """``choose`` by compiled operations: of a CPU, float32."""
    asks = Asks(len(rows))
    for row in rows:
        if row.is_likeliest:
            asks.add_likeliest()
            continue
        sampling, counts = row.sampling, row.counts
        asks.add(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            position=row.position,
            forced=row.forced,
            allowed=row.allowed,
            bias=sampling.logit_bias,
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
            known=(counts.ids, counts.counts) if counts else None,
            likeliest=sampling.top_logprobs,
        )
    tokens, scores = asks.choose(kernels, logits)
    return Choice(tokens, scores, _scored(rows))


@torch.inference_mode()
def choose_by_torch(logits: Tensor, rows: Sequence[Row]) -> Choice:
    """``choose`` in plain torch: of any device, and what the kernels are held to."""
    healthy = logits.isfinite().all(dim=-1)  # [R]
    tokens = logits.argmax(dim=-1)  # [R]; the first of equals

    def calm(at: Tensor) -> Tensor:
        return logits.index_select(0, at).masked_fill_(~healthy.index_select(0, at)[:, None], 0.0)

    for at, among in _parts(rows, lambda row: row.is_drawn, logits):
        tokens.index_copy_(0, at, _draw(calm(at), among))
    for at, among in _parts(rows, lambda row: row.is_changed, logits):
        tokens.index_copy_(0, at, _choose_changed(calm(at).double(), among))
    for at, among in _parts(rows, lambda row: row.forced is not None, logits):
        tokens.index_copy_(0, at, _indices([row.forced or 0 for row in among], logits))
    scored = _scored(rows)
    likeliest = max(scored.values(), default=0)
    scores = [
        score(calm(at), tokens.index_select(0, at).clamp_(min=0), likeliest)
        for at, _ in _parts(rows, lambda row: row.wants_logprobs, logits)
    ]
    return Choice(
        torch.where(healthy, tokens, UNHEALTHY),
        Scores(*map(torch.cat, zip(*scores, strict=True))) if scores else None,
        scored,
    )


def _scored(rows: Sequence[Row]) -> dict[int, int]:
    wanted = [row.sampling.top_logprobs for row in rows]
    return {index: count for index, count in enumerate(wanted) if count is not None}


def _parts(
    rows: Sequence[Row], belongs: Callable[[Row], bool], like: Tensor
) -> Iterator[tuple[Tensor, list[Row]]]:
    """Give out indices and rows of those that *belong*, a few at a time: memory has a bound."""
    indices = [index for index, row in enumerate(rows) if belongs(row)]
    for at in range(0, len(indices), _ROWS_AT_ONCE):
        part = indices[at : at + _ROWS_AT_ONCE]
        yield _indices(part, like), [rows[index] for index in part]


def _choose_changed(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R, V] float64 -> [R], by the logits that *rows* make of them."""
    _forbid(logits, rows)
    adjust(logits, rows)
    is_stuck = logits.amax(dim=-1) == -torch.inf
    logits.masked_fill_(is_stuck[:, None], 0.0)
    tokens = logits.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        at = _indices(drawn, logits)
        among = [rows[index] for index in drawn]
        tokens.index_copy_(0, at, _draw(logits.index_select(0, at), among))
    return tokens.masked_fill_(is_stuck, STUCK)


def _forbid(logits: Tensor, rows: Sequence[Row]) -> None:
    """Leave to each row only the tokens that it allows."""
    masked = [(index, row.allowed) for index, row in enumerate(rows) if row.allowed is not None]
    if masked:
        at = _indices([index for index, _ in masked], logits)
        words = upload(torch.stack([mask for _, mask in masked]), torch.int32, logits.device)
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (words[:, :, None] >> bits & 1).flatten(1)[:, : logits.shape[-1]].bool()
        logits.index_copy_(0, at, logits.index_select(0, at).masked_fill_(~allowed, -torch.inf))


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R, V] -> [R]; none of *logits* is NaN or infinite, and all rows have a temperature."""
    weights = _weights(logits, rows)
    narrowed = [i for i, row in enumerate(rows) if _narrows(row.sampling, logits.shape[-1])]
    if narrowed:
        at = _indices(narrowed, logits)
        parts = logits.index_select(0, at), weights.index_select(0, at)
        weights.index_copy_(0, at, _narrow(*parts, [rows[i] for i in narrowed]))
    cumulative = weights.cumsum(dim=-1)  # [R, V]
    total = cumulative[:, -1:]  # [R, 1]
    at = _column([uniform(row.sampling.seed, row.position) for row in rows], logits)
    mark = (at * total).long().minimum(total - 1)  # the product may round up to the total
    return torch.searchsorted(cumulative, mark, right=True)[:, 0]


def _weights(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R, V] -> [R, V] int64, in proportion to the probabilities that min_p leaves.

    The largest is 2**40.
    """
    found = shares(logits, _column([rate(row.sampling.temperature) for row in rows], logits))
    if any(row.sampling.min_p for row in rows):
        least = _column([row.sampling.min_p for row in rows], logits)
        found.masked_fill_(found < least, 0.0)
    return found.mul_(_UNIT).long()


def _narrows(sampling: SamplingParams, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1


def _narrow(logits: Tensor, weights: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return *weights* with 0 for the tokens that top_k and then top_p leave out."""
    count, least = _kept(logits, weights, rows)
    larger, equal = logits > least, logits == least
    left = count - larger.sum(dim=-1, keepdim=True)  # for the equal ones, the lowest ids first
    return weights.where(larger | (equal & (equal.cumsum(dim=-1) <= left)), 0)


def _kept(logits: Tensor, weights: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return how many tokens are kept, [R, 1], and the smallest logit among them, [R, 1].

    Only where the likeliest few do not tell it are all of them sorted; on a GPU always, because
    looking whether they do would be a wait for it.
    """
    vocab_size = logits.shape[-1]
    limits = [min(row.sampling.top_k or vocab_size, vocab_size) for row in rows]
    if logits.device.type == "cpu":
        depth = min(_LIKELIEST, vocab_size)
        count, least = _cut(logits.topk(depth), weights, limits, rows)
        if all(
            limit <= depth or (limit == vocab_size and kept < depth)
            for limit, kept in zip(limits, count[:, 0].tolist(), strict=True)
        ):
            return count, least
    return _cut(logits.sort(dim=-1, descending=True), weights, limits, rows)


def _cut(
    likeliest: tuple[Tensor, Tensor], weights: Tensor, limits: Sequence[int], rows: Sequence[Row]
) -> tuple[Tensor, Tensor]:
    """``_kept`` among the *likeliest* logits [R, N], largest first, and their ids.

    The order of equals is any: what they weigh is equal too.
    """
    values, ids = likeliest
    limit = _column(limits, values)
    in_limit = torch.arange(ids.shape[-1], device=ids.device) < limit
    ranked = weights.gather(-1, ids) * in_limit
    total = ranked.sum(-1, keepdim=True)
    total = total.where(limit < weights.shape[-1], weights.sum(-1, keepdim=True))
    mark = _column([row.sampling.top_p for row in rows], values) * total
    before = ranked.cumsum(dim=-1) - ranked
    count = (in_limit & (before < mark)).sum(-1, keepdim=True)
    return count, values.gather(-1, count - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return *values* as [R, 1] float64 on the device of *like*."""
    return upload(values, torch.float64, like.device)[:, None]


def _indices(values: Sequence[int], like: Tensor) -> Tensor:
    """Return *values* as [R] int64 on the device of *like*."""
    return upload(values, torch.int64, like.device)
