"""One operation of a step, as program.c draws it.

Its arguments are all there but for three counts, which a step brings: how many tokens there are,
how many of them have logits, and of how many sequences they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64

OPERATIONS = (
    "rows",
    "tiled_rows",
    "rows_of_share",
    "take",
    "add",
    "linear",
    "tiled_linear",
    "add_bias",
    "rms_norm",
    "silu_multiply",
    "rotation",
    "rotate",
    "store",
    "attention",
    "route",
    "experts",
    "add_gated",
    "causal_convolution",
    "gated_delta_rule",
    "gated_rms_norm",
    "sigmoid_multiply",
)
"""In the order of the enum in program.c."""

MAX_ARGUMENTS = 21  # as there


class Value(ctypes.Union):
    """One argument of an operation: a number, or an address."""

    _fields_ = (("i", c_int64), ("f", c_float))


class Op(ctypes.Structure):
    """One operation with its arguments, as program.c draws it."""

    _fields_ = (
        ("code", c_int),
        ("is_sampled", c_int),
        ("arguments", Value * MAX_ARGUMENTS),
    )

    @classmethod
    def of(cls, name: str, arguments: Sequence[int | float], *, is_sampled: bool = False) -> Op:
        """Return the operation; floats are floats, ints are numbers or addresses."""
        values = [Value(f=a) if isinstance(a, float) else Value(i=a) for a in arguments]
        return cls(OPERATIONS.index(name), is_sampled, (Value * MAX_ARGUMENTS)(*values))


class Step(ctypes.Structure):
    """The counts that an operation's arguments leave open."""

    _fields_ = (
        ("tokens", c_int),
        ("sampled", c_int),
        ("sequences", c_int),
        ("threads", c_int),
    )
