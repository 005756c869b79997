"""Which rows of which tensors a parameter of a model is made of.

    parameter                     tensors of the checkpoint
    qkv_proj    [q + k + v, H]    q_proj, k_proj and v_proj, one below the other (``fused``)
    experts.up  [E * rows, H]     one of [E, rows, H]; or E of [rows, H]; or, of the gates and ups
                                  of one [E, 2 * rows, H], every second half

A rank takes its cuts of them: rows lie side by side in a file, columns are ranges of each row.
Every tensor of the checkpoint must be used, so one of another shape cannot load by accident.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError, listed, shown
from cortex.models.checkpoints.names import is_derived, parameter_name
from cortex.models.checkpoints.quantized import BLOCK, FP8_TENSOR
from cortex.models.checkpoints.tensors import StoredType, TensorInfo
from cortex.models.parallel import Cut
from cortex.models.quantization import DENSE, STORED, ExpertMatrix, Matrix

READ = {**STORED, FP8_TENSOR: StoredType(FP8_TENSOR, BLOCK, BLOCK)}
"""The types of tensors a matrix is read from, in blocks that are not cut."""

SCALES = "weight_scale_inv"
GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one tensor, seen as a matrix, that follow each other; of each the bytes in *kept*."""

    tensor: TensorInfo
    first: int
    rows: int
    row_bytes: int  # of the tensor
    kept: tuple[tuple[int, int], ...]  # ranges of them
    is_paired: bool = False  # ordered in rotary pairs (``models.rope``)
    scales: TensorInfo | None = None  # one for BLOCK x BLOCK of its elements

    @property
    def kept_bytes(self) -> int:
        """Bytes of one row that are wanted."""
        return sum(end - first for first, end in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are wanted."""
        return self.rows * self.kept_bytes

    @property
    def offset(self) -> int:
        """Where the first row begins in its file."""
        return self.tensor.offset + self.first * self.row_bytes

    def part(self, first: int, rows: int) -> Source:
        """Return *rows* of these from the *first* on."""
        return replace(self, first=self.first + first, rows=rows)

    def of_scales(self) -> Source:
        """Return the scales of these rows, in rows of their own."""
        assert self.scales is not None
        size = DENSE[self.scales.type].itemsize
        first, end = self.first // BLOCK, -(-(self.first + self.rows) // BLOCK)
        kept = tuple((start // BLOCK * size, stop // BLOCK * size) for start, stop in self.kept)
        return Source(self.scales, first, end - first, self.scales.shape[1] * size, kept)


class Sources:
    """The tensors of a checkpoint under our names, and which of them nobody has asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        fused: Mapping[str, tuple[str, ...]],
        paired: tuple[str, ...],
        is_tied: bool,
    ) -> None:
        self._tensors = {
            parameter_name(name, checkpoint.format): tensor
            for name, tensor in checkpoint.tensors.items()
            if not is_derived(name)
        }
        if is_tied:
            self._tensors.pop("lm_head.weight", None)  # a copy that the configuration ignores
        self._unused = set(self._tensors)
        self._fused = fused
        self._paired = paired if checkpoint.format == "gguf" else ()
        self.is_gguf = checkpoint.format == "gguf"

    def matrix(self, name: str, matrix: Matrix) -> list[Source]:
        """Return what the rows of *matrix*, which is called *name*, are, in order."""
        prefix, _, short = name.removesuffix(".weight").rpartition(".")
        if isinstance(matrix, ExpertMatrix):
            return list(self._experts(prefix, short, matrix))
        names = self._fused.get(short, (short,))
        return [
            source
            for word, rows in zip(names, matrix.stacked, strict=True)
            for source in self._rows_of(_joined(prefix, word), rows, matrix.cut)
        ]

    def bias(self, name: str, stacked: tuple[Cut, ...]) -> list[Source]:
        """Return what the bias of the projection *name* is, stacked as its rows are."""
        prefix, _, short = name.rpartition(".")
        words = self._fused.get(short, (short,))
        return [
            source
            for word, rows in zip(words, stacked, strict=True)
            for source in self.vector(f"{_joined(prefix, word)}.bias", rows)
        ]

    def vector(self, name: str, rows: Cut, *rest: int) -> list[Source]:
        """Return what the floats [rows, *rest] are; sizes of 1 may stand between them."""
        tensor = self._take(name)
        wanted = (rows.of, *rest)
        if rest and len(tensor.shape) != len(wanted):
            tensor = replace(tensor, shape=_without_ones(tensor.shape, wanted))
        _check_shape(tensor, wanted)
        _check_floats(tensor)
        row_bytes = DENSE[tensor.type].itemsize * prod(rest)
        return [
            Source(tensor, first, end - first, row_bytes, ((0, row_bytes),))
            for first, end in rows.ranges
        ]

    def check_all_used(self) -> None:
        """Raise CheckpointError where something of the checkpoint is left over."""
        if self._unused:
            raise CheckpointError(
                f"has tensors that this architecture has no place for: {listed(self._unused)}"
            )

    def _experts(self, prefix: str, short: str, matrix: ExpertMatrix) -> Iterator[Source]:
        count, rows = matrix.experts, matrix.stacked[0]
        if _joined(prefix, f"0.{short}.weight") in self._tensors:
            for expert in range(count):
                yield from self._rows_of(_joined(prefix, f"{expert}.{short}"), rows, matrix.cut)
            return
        for tail in (".weight", ""):
            if (name := _joined(prefix, short) + tail) in self._tensors:
                tensor = self._take(name)
                yield from _of_experts(tensor, count, rows, matrix.cut, before=0, after=0)
                return
            name = _joined(prefix, f"gate_up_proj{tail}")
            if short in GATE_UP and name in self._tensors:
                before = rows.of * GATE_UP.index(short)
                tensor = self._take(name)
                yield from _of_experts(
                    tensor, count, rows, matrix.cut, before=before, after=rows.of - before
                )
                return
        raise CheckpointError(f"tensor {_joined(prefix, f'0.{short}.weight')!r} is missing")

    def _rows_of(self, name: str, rows: Cut, cut: Cut) -> Iterator[Source]:
        tensor = self._take(f"{name}.weight")
        _check_shape(tensor, (rows.of, cut.of))
        row_bytes, kept = _columns(tensor, cut)
        scales = self._scales(name, rows, cut) if tensor.type == FP8_TENSOR else None
        is_paired = name.rpartition(".")[2] in self._paired
        for first, end in rows.ranges:
            yield Source(tensor, first, end - first, row_bytes, kept, is_paired, scales)

    def _scales(self, name: str, rows: Cut, cut: Cut) -> TensorInfo:
        scales = self._take(f"{name}.{SCALES}")
        _check_shape(scales, (-(-rows.of // BLOCK), cut.of // BLOCK))
        _check_floats(scales)
        return scales

    def _take(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"tensor {name!r} is missing")
        self._unused.discard(name)
        return self._tensors[name]


def _of_experts(
    tensor: TensorInfo, count: int, rows: Cut, cut: Cut, *, before: int, after: int
) -> Iterator[Source]:
    """Cut one tensor [experts, before + rows + after, columns]."""
    each = before + rows.of + after
    _check_shape(tensor, (count, each, cut.of))
    if tensor.type == FP8_TENSOR:
        raise CheckpointError(
            f"tensor {shown(tensor.name)}: experts of 8-bit floats in one tensor are not supported"
        )
    row_bytes, kept = _columns(tensor, cut)
    if rows.is_whole and each == rows.of:
        yield Source(tensor, 0, count * each, row_bytes, kept)
        return
    for expert in range(count):
        for first, end in rows.ranges:
            start = expert * each + before + first
            yield Source(tensor, start, end - first, row_bytes, kept)


def _columns(tensor: TensorInfo, cut: Cut) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the bytes of a row of *tensor* and which of them a rank keeps."""
    stored = READ[tensor.type]
    if any(place % stored.block_elements for places in cut.ranges for place in (*places, cut.of)):
        raise CheckpointError(
            f"tensor {shown(tensor.name)}: columns {_spelled(cut)} of {cut.of} are no whole number "
            f"of {tensor.type} blocks of {stored.block_elements}"
        )

    def byte(place: int) -> int:
        return place // stored.block_elements * stored.block_bytes

    return byte(cut.of), tuple((byte(first), byte(end)) for first, end in cut.ranges)


def _spelled(cut: Cut) -> str:
    return ", ".join(f"{first} to {end - 1}" for first, end in cut.ranges)


def _without_ones(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Return *wanted* where *shape* is that with sizes of 1 in it, which move no element."""
    same = [size for size in shape if size != 1] == [size for size in wanted if size != 1]
    return wanted if same else shape


def _check_shape(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {shown(tensor.name)} is {tensor.shape}, but by the configuration {shape}"
        )


def _check_floats(tensor: TensorInfo) -> None:
    if tensor.type not in DENSE:
        raise CheckpointError(f"tensor {shown(tensor.name)} is {tensor.type}, not floats")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
