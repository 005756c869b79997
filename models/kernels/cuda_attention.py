"""Which attention serves a model on this GPU: the first that is there and is right.

    order        needs                                          prompts   single tokens
    flash_attn   flash-attn 3 (``flash_attn_interface``)        yes       yes, with its own splits
    torch        ``varlen_attn`` with pages (torch 2.12)        yes       if there is no Triton
    triton       Triton, and a C compiler for its launcher      yes       yes, in splits
    reference    nothing; asks the device for lengths, slow     yes       yes

flash-attn 2 and the copy of it in torch read pages of 256 positions and their multiples, ours have
16: the first is passed over in words, the second is tried, because what torch accepts is a matter
of its version and of the flash-attention it was told to use. Its ``varlen_attn`` is always asked
for one split: its own choice is silently wrong with pages (pytorch/pytorch#194167). One split reads
a long context with one program per head, so single tokens prefer our Triton kernel.

torch 2.11 has the same operator under a private name and without pages. Every context would be
copied out of its pages in every layer, so it serves only where "torch" is asked for.

Nothing is believed: a candidate first computes small steps of the model's own shape, which also
compiles what has to be compiled. One that fails or differs from the reference is passed over; where
it was asked for by name, that is an error. The choice is made once per shape, before any graph is
captured, and logged with the reasons.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.execution import Execution
from cortex.models.kernels import reference

DRAFTED_TOKENS = 8
"""Tokens per sequence up to which a step is one of single tokens, with some drafts perhaps."""

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""By how much an output of a candidate may differ from float32's, for inputs of size 1."""

TRIALS = (
    ((0, 70), (21, 67)),
    ((300, 70),),
    ((300, 1), (0, 1), (35, 1)),
    ((9, 1),),
    ((300, 2), (35, 2)),
    ((9, 2),),
)
"""Steps of sequences given as (cached before, new tokens): prompts, single tokens, and with drafts,
on long and on short contexts, so that all that is compiled is compiled by them."""

HALVES = (torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)


class Attend(Protocol):
    """Attention of one layer, as ``reference.attention``."""

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, /
    ) -> Tensor:
        """Q [T, N, D] against the cache -> [T, N, D]."""


class Unavailable(RuntimeError):
    """An attention does not serve here; the text says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides which attention serves it."""

    heads: int
    kv_heads: int
    size: int
    block_tokens: int
    dtype: torch.dtype
    device_type: str = "cuda"

    @classmethod
    def of(cls, q: Tensor, keys: Tensor) -> Shape:
        """Return the shape of queries [T, N, D] and a layer's keys."""
        return cls(q.size(1), keys.size(2), q.size(2), keys.size(1), q.dtype, q.device.type)


Candidate = Callable[[Shape, Execution], Attend]
"""Finds its attention; raises Unavailable or, where something is not installed, ImportError."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The attention of a shape, one for prompts and one for single tokens."""

    prompts: Attend
    single_tokens: Attend

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """Q [T, N, D] against the cache -> [T, N, D]; which one follows from shapes alone."""
        sequences = batch.block_tables.size(0)
        is_prompt = q.size(0) > DRAFTED_TOKENS * sequences
        attend = self.prompts if is_prompt else self.single_tokens
        return attend(q, keys, values, batch, scale)


@cache
def attention_for(shape: Shape, execution: Execution) -> Choice:
    """Return what serves *shape*, chosen once; raises Unavailable where it was named and cannot."""
    return choose(shape, execution, CANDIDATES, try_out)


def choose(
    shape: Shape,
    execution: Execution,
    candidates: Mapping[str, Candidate],
    try_out: Callable[[Attend, Shape], None],
) -> Choice:
    """Choose among *candidates*, in their order, those that *try_out* lets pass."""
    wanted = execution.attention
    if execution.is_batch_invariant:
        if wanted not in {"auto", "triton"}:
            raise Unavailable(f"batch_invariant needs the attention triton, not {wanted}")
        wanted = "triton"
    passed_over = dict[str, str]()

    def found(names: Sequence[str]) -> tuple[str, Attend] | None:
        for name in names:
            if name not in passed_over:
                try:
                    attend = candidates[name](shape, execution)
                    try_out(attend, shape)
                except (Unavailable, ImportError) as exc:
                    passed_over[name] = str(exc)
                else:
                    return name, attend
        return None

    prompts = found(list(candidates) if wanted == "auto" else [wanted])
    if prompts is None:
        reasons = "; ".join(passed_over.values())
        raise Unavailable(f"the attention {wanted!r} does not serve here: {reasons}")
    single = prompts
    if wanted == "auto" and prompts[0] == "torch":
        single = found(["triton"]) or prompts
    _log_choice(prompts[0], single[0], passed_over)
    return Choice(prompts[1], single[1])


def _log_choice(prompts: str, single: str, passed_over: Mapping[str, str]) -> None:
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
    level = logging.WARNING if prompts == "reference" else logging.INFO
    log.log(
        level,
        "attention of prompts by %s, of single tokens by %s; passed over: %s",
        prompts,
        single,
        reasons or "none",
    )


def _flash_attn(shape: Shape, _: Execution) -> Attend:
    """flash-attn 3 (Shah et al., arXiv:2407.08608), whose pages may be of any size."""
    _only_halves(shape)
    try:
        attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    except ImportError:
        importlib.import_module("flash_attn")
        raise Unavailable(
            f"flash-attn 2 reads pages of 256 positions, ours have {shape.block_tokens}; "
            "flash-attn 3 is not installed"
        ) from None

    def flash_attn(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
        return attend(
            q.contiguous(),
            keys,
            values,
            cache_seqlens=batch.context_tokens,
            page_table=batch.block_tables,
            cu_seqlens_q=batch.query_starts,
            max_seqlen_q=_most_queries(q, batch),
            softmax_scale=scale,
            causal=True,
        )

    return flash_attn


def _torch(shape: Shape, execution: Execution) -> Attend:
    """Flash-attention as torch has it, over pages where it knows them."""
    _only_halves(shape)
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if "block_table" in inspect.signature(varlen).parameters:
        return _torch_paged(varlen)
    if "seqused_k" not in str(torch.ops.aten._flash_attention_forward.default._schema):  # noqa: SLF001 - what 2.11 has
        raise Unavailable("torch's flash-attention takes no lengths of contexts")
    if execution.attention != "torch":
        raise Unavailable("torch's flash-attention has no pages before torch 2.12")
    return _torch_packed


def _torch_paged(varlen: Callable[..., Tensor]) -> Attend:
    def torch_paged(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
        sequences, longest = _room(keys, batch)
        return varlen(
            q.contiguous(),
            keys,
            values,
            batch.query_starts,
            _equal_starts(sequences, longest, q.device),
            _most_queries(q, batch),
            longest,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=q.size(1) != keys.size(2),
            seqused_k=batch.context_tokens,
            block_table=batch.block_tables,
            num_splits=1,
        )

    return torch_paged


def _torch_packed(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """Copy every context out of its pages, each into as much room as the longest could need."""
    sequences, longest = _room(keys, batch)
    tables = batch.block_tables.flatten()
    operator: Any = torch.ops.aten._flash_attention_forward  # noqa: SLF001 - torch 2.11 has no other
    return operator(
        q.contiguous(),
        keys.index_select(0, tables).flatten(0, 1),
        values.index_select(0, tables).flatten(0, 1),
        batch.query_starts,
        _equal_starts(sequences, longest, q.device),
        _most_queries(q, batch),
        longest,
        0.0,  # dropout
        True,  # is_causal
        False,  # return_debug_mask
        scale=scale,
        seqused_k=batch.context_tokens,
    )[0]


def _triton(shape: Shape, execution: Execution) -> Attend:
    from cortex.models.kernels import triton_attention

    if shape.size > triton_attention.LARGEST_HEAD:
        raise Unavailable(f"heads of {shape.size} elements are too large for it")

    def triton(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
        is_invariant = execution.is_batch_invariant
        return triton_attention.attention(
            q, keys, values, batch, scale, batch_invariant=is_invariant
        )

    return triton


def _reference(_: Shape, __: Execution) -> Attend:
    return reference.attention


CANDIDATES: Mapping[str, Candidate] = {
    "flash_attn": _flash_attn,
    "torch": _torch,
    "triton": _triton,
    "reference": _reference,
}
"""By the name an operator may ask for, the preferred first."""


def _only_halves(shape: Shape) -> None:
    if shape.dtype not in HALVES:
        raise Unavailable(f"it computes in 16 bits, the model in {shape.dtype}")


def _room(keys: Tensor, batch: Batch) -> tuple[int, int]:
    """Return the sequences, and the positions that the block tables have room for."""
    sequences, blocks = batch.block_tables.shape
    return sequences, blocks * keys.size(1)


def _most_queries(q: Tensor, batch: Batch) -> int:
    """Return no fewer queries than any sequence has; the device alone knows how many."""
    return q.size(0) - batch.block_tables.size(0) + 1


def _equal_starts(sequences: int, longest: int, device: torch.device) -> Tensor:
    return torch.arange(sequences + 1, dtype=torch.int32, device=device) * longest


def try_out(attend: Attend, shape: Shape) -> None:
    """Hold *attend* to the reference in every kind of step.

    Raises Unavailable with what it said or by how much it differs; an error that the device does
    not recover from is raised as it is.
    """
    if attend is reference.attention:
        return
    for lengths in TRIALS:
        q, keys, values, batch = trial_step(shape, lengths)
        scale = shape.size**-0.5
        try:
            found = attend(q, keys, values, batch, scale).float()
            expected = reference.attention(q.float(), keys.float(), values.float(), batch, scale)
            difference = (found - expected).abs().max().item()
        except Exception as exc:
            torch.zeros(1, device=shape.device_type).item()  # raises where the device is lost
            raise Unavailable(f"{type(exc).__name__}: {exc}".splitlines()[0]) from exc
        if not difference <= TOLERANCES[shape.dtype]:  # NaN is not
            raise Unavailable(f"it differs from the reference by {difference:.3g}")


def trial_step(
    shape: Shape, lengths: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Return queries, keys, values and batch of sequences given as (cached before, new tokens).

    Their blocks lie backwards; nothing but what attention reads is in the batch.
    """
    generator = torch.Generator().manual_seed(0)
    tables, used = list[list[int]](), 0
    for before, new in lengths:
        count = -(-(before + new) // shape.block_tokens)
        tables.append(list(range(used + count - 1, used - 1, -1)))
        used += count
    width = max(len(table) for table in tables)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(shape.device_type, shape.dtype)

    def integers(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=shape.device_type)

    starts = [sum(new for _, new in lengths[:at]) for at in range(len(lengths) + 1)]
    unread = torch.empty(0, device=shape.device_type)
    cache_shape = (used, shape.block_tokens, shape.kv_heads, shape.size)
    batch = Batch(
        token_ids=unread,
        positions=unread,
        slots=unread,
        query_starts=integers(starts),
        context_tokens=integers([before + new for before, new in lengths]),
        block_tables=integers([table + [0] * (width - len(table)) for table in tables]),
        sampled=unread,
        cache=KVCache([], [], shape.block_tokens),
    )
    q = random(starts[-1], shape.heads, shape.size)
    return q, random(*cache_shape), random(*cache_shape), batch
