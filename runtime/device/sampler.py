"""The next token of every row of logits. A row's token depends on that row alone.

What applies to a row, in this order; at temperature 0 the likeliest is taken after 5:

    1   health                 a NaN or an infinity: no token
    2   logprobs               of the logits as they are                         logprobs.py
    3   a token put in         nothing below applies to it                       reasoning_block.py
    4   logit_bias             is added                                          penalties.py
    5   repetition, frequency  take from tokens that were there before           penalties.py
        and presence penalty
    6   temperature            divides
    7   min_p                  keeps p >= min_p * the likeliest token's p
    8   top_k                  keeps the k largest, of equals the lowest ids
    9   top_p                  keeps the nucleus, with the token that crosses the mark
    10  the draw               at one uniform number per (seed, position)

The order is vLLM's. transformers, too, penalises, divides, then filters, but with top_p before
min_p; llama.cpp also begins with the bias and the penalties, but divides last. min_p is Nguyen et
al.'s (arXiv:2407.01082), the nucleus Holtzman et al.'s (arXiv:1904.09751). The draw inverts the
cumulative distribution in order of token ids.

Probabilities are turned into whole numbers, in units of 2**-40 of the likeliest token's, before
anything is summed. Sums of whole numbers do not depend on the order of summation, so one row or
forty, this device or another, a tree or a loop: the same token. What comes before is float64.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.logprobs import scored
from cortex.runtime.device.penalties import adjust
from cortex.runtime.device.philox import uniform
from cortex.runtime.device.row import Chosen, Row

_UNIT = 2.0**40  # 2**18 tokens of the likeliest one's weight still sum to less than 2**63
_ROWS_AT_ONCE = 8
_LIKELIEST = 1024  # finding so many of 49,152 takes a CPU 0.4 ms, sorting all of them 2.9 ms
_BYTES_PER_LOGIT = 96


def sampling_bytes(rows: int, vocab_size: int) -> int:
    """Return a bound of the memory that ``sample`` takes beside the logits, and of the logits."""
    return vocab_size * (rows * 8 + min(rows, _ROWS_AT_ONCE) * _BYTES_PER_LOGIT)


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """[R, V] float32 -> R tokens; none for a row that has a NaN or an infinity in it."""
    healthy = logits.isfinite().all(dim=-1)  # [R]
    tokens = logits.argmax(dim=-1)  # [R]; the first of equals

    def calm(part: list[int]) -> Tensor:
        return logits[part].masked_fill(~healthy[part, None], 0.0)

    for part, among in _parts(rows, lambda row: row.is_drawn):
        tokens[part] = _draw(calm(part), among)
    for part, among in _parts(rows, lambda row: row.is_adjusted):
        tokens[part] = _choose_adjusted(calm(part).double(), among)
    for part, among in _parts(rows, lambda row: row.forced is not None):
        tokens[part] = torch.tensor([row.forced for row in among], device=tokens.device)
    chosen: dict[int, Chosen] = {}
    for part, among in _parts(rows, lambda row: row.wants_logprobs):
        wanted = [row.sampling.top_logprobs or 0 for row in among]
        chosen.update(zip(part, scored(calm(part), tokens[part], wanted), strict=True))
    found = torch.where(healthy, tokens, -1).tolist()  # without logprobs the only wait
    return [
        chosen.get(index, Chosen(token)) if token >= 0 else Chosen(None)
        for index, token in enumerate(found)
    ]


def _parts(
    rows: Sequence[Row], belongs: Callable[[Row], bool]
) -> Iterator[tuple[list[int], list[Row]]]:
    """Give out indices and rows of those that *belong*, a few at a time: memory has a bound."""
    indices = [index for index, row in enumerate(rows) if belongs(row)]
    for at in range(0, len(indices), _ROWS_AT_ONCE):
        part = indices[at : at + _ROWS_AT_ONCE]
        yield part, [rows[index] for index in part]


def _choose_adjusted(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R, V] float64 -> [R], by the logits that *rows* make of them."""
    adjust(logits, rows)
    tokens = logits.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [rows[index] for index in drawn])
    return tokens


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R, V] -> [R]; all of *logits* are finite and all rows have a temperature."""
    weights = _weights(logits, rows)
    narrowed = [i for i, row in enumerate(rows) if _narrows(row.sampling, logits.shape[-1])]
    if narrowed:
        kept = _narrow(logits[narrowed], weights[narrowed], [rows[i] for i in narrowed])
        weights[narrowed] = kept
    cumulative = weights.cumsum(dim=-1)  # [R, V]
    total = cumulative[:, -1:]  # [R, 1]
    at = _column([uniform(row.sampling.seed, row.position) for row in rows], logits)
    mark = (at * total).long().minimum(total - 1)  # the product may round up to the total
    return torch.searchsorted(cumulative, mark, right=True)[:, 0]


def _weights(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R, V] -> [R, V] int64, in proportion to the probabilities that min_p leaves.

    The largest is 2**40.
    """
    temperature = _column([row.sampling.temperature for row in rows], logits)
    exact = logits.double()
    shares = (exact - exact.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    if any(row.sampling.min_p for row in rows):
        least = _column([row.sampling.min_p for row in rows], logits)
        shares.masked_fill_(shares < least, 0.0)
    return shares.mul_(_UNIT).long()


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
    looking whether they do would be one more wait for it.
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
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
