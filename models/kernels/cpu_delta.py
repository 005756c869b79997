"""The operations of gated_delta.c; each returns what its namesake in ``reference_delta`` does.

Steps of any size run token by token: the rule by chunks would sum in another order wherever a
sequence's steps are cut otherwise, and gain little (gated_delta.c says why).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.kernels.reference_delta import DeltaHeads

MAX_KEY_DIM = 256  # as in gated_delta.c


class DeltaOperations(ABC):
    """What ``cpu.CpuKernels`` has for layers with a recurrent state."""

    @abstractmethod
    def new(self, like: Tensor, *columns: int) -> Tensor:
        """Return an empty float32 tensor with as many rows as *like*."""

    @abstractmethod
    def do(self, name: str, rows_of: Tensor, *arguments: float, sequences: int = 0) -> int:
        """Run an operation on the rows of *rows_of*; return 0 unless it failed."""

    def causal_convolution(self, x: Tensor, weight: Tensor, kept: Tensor, batch: Batch) -> Tensor:
        """X [T, C], whose rows may lie apart -> [T, C]; *kept* is [slots, C, kernel - 1]."""
        assert x.stride(1) == 1, "a token's channels lie together"
        y = self.new(x, x.size(1))
        self.do(
            "causal_convolution",
            y,
            *(x.data_ptr(), x.stride(0), weight.data_ptr(), kept.data_ptr()),
            *_sequences(batch),
            *(y.data_ptr(), x.size(1), weight.size(1)),
            sequences=batch.query_starts.size(0) - 1,
        )
        return y

    def gated_delta_rule(
        self,
        qkv: Tensor,
        ba: Tensor,
        rate: Tensor,
        bias: Tensor,
        *,
        states: Tensor,
        heads: DeltaHeads,
        batch: Batch,
    ) -> Tensor:
        """[q | k | v] [T, C] and [b | a] [T, 2 V] -> [T, V, value_dim]."""
        assert heads.key_dim <= MAX_KEY_DIM, "longer keys are the reference's"
        qkv, ba = qkv.contiguous(), ba.contiguous()
        out = self.new(qkv, heads.values, heads.value_dim)
        addresses = (tensor.data_ptr() for tensor in (qkv, ba, rate, bias, states))
        self.do(
            "gated_delta_rule",
            out,
            *(*addresses, *_sequences(batch), out.data_ptr()),
            *(heads.keys, heads.values, heads.key_dim, heads.value_dim, heads.is_tiled),
            sequences=batch.query_starts.size(0) - 1,
        )
        return out

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """X [T, V, D] and z [T, V * D], whose rows may lie apart -> [T, V * D]."""
        assert z.stride(1) == 1, "a token's heads lie together"
        x = x.contiguous()
        y = self.new(x, x.size(1) * x.size(2))
        where = (x.data_ptr(), z.data_ptr(), z.stride(0), weight.data_ptr(), y.data_ptr())
        self.do("gated_rms_norm", y, *where, x.size(1), x.size(2), float(eps))
        return y

    def sigmoid_multiply(self, x: Tensor, gate: Tensor) -> Tensor:
        """X [M, K] and a gate [M, K], whose rows may lie apart -> [M, K]."""
        assert gate.stride(1) == 1, "a row's elements lie together"
        x = x.contiguous()
        y = self.new(x, x.size(1))
        where = (x.data_ptr(), gate.data_ptr(), gate.stride(0), y.data_ptr())
        self.do("sigmoid_multiply", y, *where, x.size(1))
        return y


def _sequences(batch: Batch) -> tuple[int, int, int]:
    """Return where the slots, the first tokens and the positions of the sequences are."""
    assert batch.state_slots is not None, "a recurrent layer needs slots"
    tensors = (batch.state_slots, batch.query_starts, batch.positions)
    assert all(tensor.is_contiguous() for tensor in tensors)
    slots, starts, positions = (tensor.data_ptr() for tensor in tensors)
    return slots, starts, positions
