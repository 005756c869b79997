"""What a rank reads of a checkpoint: its rows and columns of each tensor, and no other bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.layers import RMSNorm, Vector
from cortex.models.linear import Projection
from cortex.models.parallel import Cut, Group
from cortex.models.quantization import ExpertMatrix
from tiny_loads import CountedReads, checkpoint_of, fill, values


def cut_of(x: Tensor, cut: Cut, dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, a, b - a) for a, b in cut.ranges], dim)


@st.composite
def cuts(draw: st.DrawFn, most: int = 12) -> Cut:
    """Any ranges of a dimension, in order."""
    of = draw(st.integers(1, most))
    borders = sorted(draw(st.sets(st.integers(0, of), min_size=2, max_size=6)))
    ranges = tuple(zip(borders[::2], borders[1::2], strict=False))
    return Cut(of, ranges)


@settings(deadline=None, max_examples=60)
@given(st.lists(cuts(), min_size=1, max_size=3), cuts(), st.data())
def test_a_matrix_holds_its_cuts_of_its_tensors(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Cut], columns: Cut, data: st.DataObject
) -> None:
    names = tuple(f"p{i}" for i in range(len(rows)))
    dtypes = [data.draw(st.sampled_from([torch.float32, torch.bfloat16])) for _ in rows]
    tensors = {
        f"a.{name}.weight": torch.randn(cut.of, columns.of).to(dtype)
        for name, cut, dtype in zip(names, rows, dtypes, strict=True)
    }
    path = tmp_path_factory.mktemp("cuts") / "model.safetensors"
    projection = Projection(columns, tuple(rows))
    module = nn.ModuleDict({"a": nn.ModuleDict({"all": projection})})

    fill(module, checkpoint_of(path, tensors), fused={"all": names})

    expected = [
        cut_of(cut_of(tensor.float(), cut, 0), columns, 1)
        for tensor, cut in zip(tensors.values(), rows, strict=True)
    ]
    assert torch.equal(values(projection.weight), torch.cat(expected))


def test_of_rows_no_byte_is_read_that_belongs_to_another_rank(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "m", {"a.weight": torch.randn(64, 8)})
    reads = CountedReads()

    fill(
        nn.ModuleDict({"a": Projection(Cut.whole(8), (Group(3, 4).share(64),))}),
        checkpoint,
        preadv=reads,
    )

    tensor = checkpoint.tensors["a.weight"]
    assert reads.runs == [(tensor.offset + 48 * 8 * 4, 16 * 8 * 4)]


def test_of_columns_whole_runs_are_read_and_the_ends_left_out(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "m", {"a.weight": torch.randn(64, 8)})
    reads = CountedReads()
    projection = Projection(Group(1, 4).share(8), (Cut.whole(64),))

    fill(nn.ModuleDict({"a": projection}), checkpoint, preadv=reads)

    tensor = checkpoint.tensors["a.weight"]
    assert reads.runs == [(tensor.offset + 2 * 4, 64 * 8 * 4 - (2 + 4) * 4)]
    assert projection.weight.bytes == 64 * 2 * 4


def test_columns_are_read_by_a_bounded_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 8)
    checkpoint = checkpoint_of(tmp_path / "m", {"a.weight": weight})
    monkeypatch.setattr("cortex.models.tensor_reader.GAPS_BYTES", 100)
    reads = CountedReads()
    projection = Projection(Group(1, 2).share(8), (Cut.whole(64),))

    fill(nn.ModuleDict({"a": projection}), checkpoint, preadv=reads)

    assert max(count for _, count in reads.runs) <= 100
    assert torch.equal(values(projection.weight), weight[:, 4:])


def experts_of(tensor: Tensor, name: str, layout: str) -> dict[str, Tensor]:
    """Return the tensors of experts [E, rows, columns] as a checkpoint may have them."""
    match layout:
        case "one by one":
            return {f"experts.{e}.{name}.weight": rows for e, rows in enumerate(tensor)}
        case "in one":
            return {f"experts.{name}.weight": tensor}
        case _:
            return {f"experts.{name}": tensor}


@pytest.mark.parametrize("layout", ["one by one", "in one", "in one, bare"])
@pytest.mark.parametrize("group", [Group(), Group(1, 2)])
def test_experts_are_read_one_after_the_other(tmp_path: Path, layout: str, group: Group) -> None:
    up, down = torch.randn(3, 4, 6), torch.randn(3, 6, 4)
    tensors = experts_of(up, "up_proj", layout) | experts_of(down, "down_proj", layout)
    inner = group.share(4)
    experts = nn.ModuleDict(
        {
            "up_proj": ExpertMatrix(3, inner, Cut.whole(6)),
            "down_proj": ExpertMatrix(3, Cut.whole(6), inner),
        }
    )

    fill(nn.ModuleDict({"experts": experts}), checkpoint_of(tmp_path / "m", tensors))

    found: Any = experts
    assert torch.equal(values(found["up_proj"]), cut_of(up, inner, 1).flatten(0, 1))
    assert torch.equal(values(found["down_proj"]), cut_of(down, inner, 2).flatten(0, 1))


@pytest.mark.parametrize("tail", ["", ".weight"])
@pytest.mark.parametrize("group", [Group(), Group(1, 2)])
def test_gates_and_ups_of_one_tensor_are_told_apart(
    tmp_path: Path, tail: str, group: Group
) -> None:
    gate_up = torch.randn(3, 8, 6)
    inner = group.share(4)
    names = ("gate_proj", "up_proj")
    experts = nn.ModuleDict({name: ExpertMatrix(3, inner, Cut.whole(6)) for name in names})
    checkpoint = checkpoint_of(tmp_path / "m", {f"experts.gate_up_proj{tail}": gate_up})

    fill(nn.ModuleDict({"experts": experts}), checkpoint)

    found: Any = experts
    for name, half in zip(names, gate_up.chunk(2, 1), strict=True):
        assert torch.equal(values(found[name]), cut_of(half, inner, 1).flatten(0, 1))


def test_whole_experts_of_one_tensor_are_read_at_once(tmp_path: Path) -> None:
    tensors = {"experts.up_proj.weight": torch.randn(3, 4, 6)}
    reads = CountedReads()
    experts = nn.ModuleDict({"up_proj": ExpertMatrix(3, Cut.whole(4), Cut.whole(6))})

    fill(
        nn.ModuleDict({"experts": experts}),
        checkpoint_of(tmp_path / "m", tensors),
        preadv=reads,
    )

    assert [count for _, count in reads.runs] == [3 * 4 * 6 * 4]


def test_experts_of_several_types_are_refused(tmp_path: Path) -> None:
    tensors = {
        "experts.0.up.weight": torch.randn(4, 6),
        "experts.1.up.weight": torch.ones(4, 6).half(),
    }
    experts = nn.ModuleDict({"up": ExpertMatrix(2, Cut.whole(4), Cut.whole(6))})

    with pytest.raises(CheckpointError, match=r"experts\.up are of more than one type: F32, F16"):
        fill(nn.ModuleDict({"experts": experts}), checkpoint_of(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, r"'experts\.0\.up\.weight' is missing"),
        ({"experts.0.up.weight": torch.ones(4, 6)}, r"'experts\.1\.up\.weight' is missing"),
        ({"experts.up": torch.ones(3, 4, 6)}, r"is \(3, 4, 6\), but .* \(2, 4, 6\)"),
        ({"experts.up": torch.ones(2, 6, 4)}, r"is \(2, 6, 4\), but .* \(2, 4, 6\)"),
    ],
)
def test_experts_that_are_not_there_are_named(
    tmp_path: Path, tensors: dict[str, Tensor], says: str
) -> None:
    experts = nn.ModuleDict({"up": ExpertMatrix(2, Cut.whole(4), Cut.whole(6))})

    with pytest.raises(CheckpointError, match=says):
        fill(nn.ModuleDict({"experts": experts}), checkpoint_of(tmp_path / "m", tensors))


@pytest.mark.parametrize("stored", [(8, 1, 4), (8, 4)])
def test_a_vector_may_have_sizes_of_one_between_its_own(
    tmp_path: Path, stored: tuple[int, ...]
) -> None:
    weight = torch.randn(8, 4).half()
    cut = Cut(8, ((0, 2), (5, 8)))
    vector = Vector(cut, 4)
    checkpoint = checkpoint_of(tmp_path / "m", {"conv1d.weight": weight.view(stored)})

    fill(nn.ModuleDict({"conv1d": vector}), checkpoint)

    assert vector.value.dtype == torch.float32
    assert torch.equal(vector.value, cut_of(weight.float(), cut, 0))


def test_a_vector_may_have_a_bare_name(tmp_path: Path) -> None:
    vector = Vector(Group(1, 2).share(6), kind="")

    fill(
        nn.ModuleDict({"dt_bias": vector}),
        checkpoint_of(tmp_path / "m", {"dt_bias": torch.arange(6.0)}),
    )

    assert vector.value.tolist() == [3, 4, 5]


@pytest.mark.parametrize("shape", [(4, 8), (8, 1, 5), (32,), (1, 4, 8)])
def test_a_vector_of_another_shape_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    checkpoint = checkpoint_of(tmp_path / "m", {"conv1d.weight": torch.ones(shape)})

    with pytest.raises(CheckpointError, match=r"'conv1d.weight' is .* \(8, 4\)"):
        fill(nn.ModuleDict({"conv1d": Vector(Cut.whole(8), 4)}), checkpoint)


@pytest.mark.parametrize(("form", "added"), [("safetensors", 1.0), ("gguf", 0.0)])
def test_a_centred_norm_lacks_its_one_in_safetensors_only(
    tmp_path: Path, form: str, added: float
) -> None:
    stored = torch.randn(6)
    centred, plain = RMSNorm(6, 1e-6, is_centred=True), RMSNorm(6, 1e-6)
    checkpoint = checkpoint_of(tmp_path / "m", {"c.weight": stored, "p.weight": stored}, form)

    fill(nn.ModuleDict({"c": centred, "p": plain}), checkpoint)

    assert torch.equal(centred.weight, stored + added)
    assert torch.equal(plain.weight, stored)


def test_a_bias_is_cut_as_the_rows_are(tmp_path: Path) -> None:
    tensors = {
        "q.weight": torch.randn(4, 2),
        "k.weight": torch.randn(2, 2),
        "q.bias": torch.arange(4.0),
        "k.bias": torch.arange(10.0, 12.0).half(),
    }
    group = Group(1, 2)
    projection = Projection(Cut.whole(2), (group.share(4), group.share(2)), has_bias=True)

    fill(
        nn.ModuleDict({"qk": projection}),
        checkpoint_of(tmp_path / "m", tensors),
        fused={"qk": ("q", "k")},
    )

    assert projection.bias is not None
    assert projection.bias.tolist() == [2, 3, 11]


def test_a_matrix_used_twice_is_read_once(tmp_path: Path) -> None:
    first, second = (Projection(Cut.whole(2), (Cut.whole(4),)) for _ in range(2))
    second.weight = first.weight
    reads = CountedReads()
    checkpoint = checkpoint_of(tmp_path / "m", {"first.weight": torch.randn(4, 2)})

    fill(nn.ModuleDict({"first": first, "second": second}), checkpoint, preadv=reads)

    assert reads.bytes == 4 * 2 * 4
