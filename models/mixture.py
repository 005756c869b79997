"""Mixture of experts, as Qwen's models have it: each token goes through a few of many SwiGLUs.

    ids, weights = the experts_per_token largest of softmax(router x)
    y = sum over them of weight * Expert_id(x)    [+ sigmoid(g x) * SharedExpert(x)]

The experts of a layer are computed together: tokens are sorted by expert and each expert's weights
are read once, however many tokens chose it. Ranks split every expert, and the shared one, by its
inner dimension as a SwiGLU is split, so a layer needs one sum over the ranks. Router and shared
gate are whole on every rank, which hence all choose the same experts.

Paper: Shazeer et al., arXiv:1701.06538. Source: huggingface/transformers, models/qwen3_moe and
models/qwen3_next; parameter names are those of their checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cortex.models.kernels import ops
from cortex.models.linear import ColumnParallel, Projection, Replicated
from cortex.models.parallel import ALONE, Cut, Group
from cortex.models.quantization import ExpertMatrix


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """The sizes of a mixture; those of its layers are equal."""

    experts: int
    experts_per_token: int
    expert_size: int  # inner dimension of one expert
    is_normalised: bool  # whether the weights of a token's experts are made to sum to 1
    shared_size: int = 0  # inner dimension of the shared expert; 0 where there is none


class SparseMoe(nn.Module):
    """What stands in a layer where a dense model has its SwiGLU."""

    def __init__(self, hidden_size: int, shape: MixtureShape, group: Group = ALONE) -> None:
        super().__init__()
        self.shape = shape
        self.group = group
        self.gate = Replicated(hidden_size, shape.experts)
        self.experts = Experts(hidden_size, shape, group)
        if shape.shared_size:
            self.shared_expert = SharedExpert(hidden_size, shape.shared_size, group)
            self.shared_expert_gate = Replicated(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        ids, weights = ops.route(
            self.gate(x), self.shape.experts_per_token, is_normalised=self.shape.is_normalised
        )
        y = self.experts(x, ids, weights)
        if self.shape.shared_size:
            y = ops.add_gated(y, self.shared_expert(x), self.shared_expert_gate(x))
        return ops.all_reduce(y, self.group)


class Experts(nn.Module):
    """The SwiGLUs that tokens are sent to."""

    def __init__(self, hidden_size: int, shape: MixtureShape, group: Group) -> None:
        super().__init__()
        inner, hidden = group.inner(shape.expert_size), Cut.whole(hidden_size)
        self.gate_proj = ExpertMatrix(shape.experts, inner, hidden)
        self.up_proj = ExpertMatrix(shape.experts, inner, hidden)
        self.down_proj = ExpertMatrix(shape.experts, hidden, inner)
        self.is_batch_invariant = False  # weights.py knows

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, H] through experts ids [T, k] with weights [T, k] -> [T, H], of this rank."""
        return ops.experts(
            *(x, ids, weights),
            gate=self.gate_proj,
            up=self.up_proj,
            down=self.down_proj,
            is_batch_invariant=self.is_batch_invariant,
        )


class SharedExpert(nn.Module):
    """The SwiGLU that every token goes through; its sum over the ranks is the whole layer's."""

    def __init__(self, hidden_size: int, size: int, group: Group) -> None:
        super().__init__()
        inner = group.inner(size)
        self.gate_up_proj = ColumnParallel(hidden_size, inner, inner, group=group)
        self.down_proj = Projection(inner, (Cut.whole(hidden_size),))

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], of this rank."""
        return self.down_proj(ops.silu_multiply(self.gate_up_proj(x)))
