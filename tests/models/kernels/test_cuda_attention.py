"""Which attention is chosen, by what is installed, and how a step reaches it."""

from __future__ import annotations

import builtins
import importlib
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.execution import Execution
from cortex.models.kernels import cuda_attention, reference
from cortex.models.kernels.cuda_attention import (
    CANDIDATES,
    Attend,
    Candidate,
    Choice,
    Shape,
    Unavailable,
    choose,
    trial_step,
    try_out,
)

SHAPE = Shape(4, 2, 64, 16, torch.bfloat16, "cpu")
WIDE = Shape(4, 2, 64, 16, torch.float32, "cpu")


def named(name: str) -> Attend:
    """Return an attention that answers with its name."""

    def attend(*_: Any) -> Any:
        return name

    return attend


def there(*names: str) -> dict[str, Candidate]:
    """Return candidates of which only those named are there."""

    def candidate(name: str) -> Candidate:
        def find(_: Shape, __: Execution) -> Attend:
            if name not in names:
                raise Unavailable(f"{name} is not there")
            return named(name)

        return find

    return {name: candidate(name) for name in CANDIDATES}


def chosen(candidates: Mapping[str, Candidate], **execution: Any) -> tuple[Any, Any]:
    """Return what serves prompts and what serves single tokens."""
    choice = choose(SHAPE, Execution(**execution), candidates, lambda *_: None)
    return called(choice, (0, 20)), called(choice, (20, 1))


def called(choice: Choice, *lengths: tuple[int, int]) -> Any:
    return choice(*trial_step(SHAPE, lengths), 0.1)


@pytest.mark.parametrize(
    ("names", "prompts", "single_tokens"),
    [
        (("flash_attn", "torch", "triton", "reference"), "flash_attn", "flash_attn"),
        (("torch", "triton", "reference"), "torch", "triton"),
        (("torch", "reference"), "torch", "torch"),
        (("triton", "reference"), "triton", "triton"),
        (("reference",), "reference", "reference"),
    ],
)
def test_the_first_that_is_there_serves(
    names: tuple[str, ...], prompts: str, single_tokens: str
) -> None:
    assert chosen(there(*names)) == (prompts, single_tokens)


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_one_that_is_named_serves_all(name: str) -> None:
    assert chosen(there(*CANDIDATES), attention=name) == (name, name)


def test_the_one_that_is_named_and_not_there_is_an_error() -> None:
    with pytest.raises(Unavailable, match="'torch' does not serve here: torch is not there"):
        chosen(there("triton", "reference"), attention="torch")


def test_batch_invariance_is_served_by_triton_alone() -> None:
    assert chosen(there(*CANDIDATES), is_batch_invariant=True) == ("triton", "triton")

    with pytest.raises(Unavailable, match="not flash_attn"):
        chosen(there(*CANDIDATES), is_batch_invariant=True, attention="flash_attn")
    with pytest.raises(Unavailable, match="triton is not there"):
        chosen(there("reference"), is_batch_invariant=True)


def test_a_few_drafts_are_single_tokens_still() -> None:
    choice = choose(SHAPE, Execution(), there("torch", "triton"), lambda *_: None)

    assert called(choice, (20, 8)) == "triton"
    assert called(choice, (20, 9), (3, 7)) == "triton"
    assert called(choice, (20, 9)) == "torch"


def test_one_that_fails_its_trial_is_passed_over_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = list[Any]()

    def fails_torch(attend: Attend, _: Shape) -> None:
        tried.append(attend(*trial_step(SHAPE, [(0, 1)]), 0.1))
        if tried[-1] == "torch":
            raise Unavailable("it differs from the reference by 3")

    with caplog.at_level(logging.INFO):
        choose(SHAPE, Execution(), there("torch", "triton"), fails_torch)

    assert tried == ["torch", "triton"]
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "prompts by triton, of single tokens by triton" in record.getMessage()
    assert "flash_attn: flash_attn is not there" in record.getMessage()
    assert "torch: it differs from the reference by 3" in record.getMessage()


def test_plain_torch_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    choose(SHAPE, Execution(), there("reference"), lambda *_: None)

    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(3, 1, 8, 16, torch.float32, "cpu")
    monkeypatch.setattr(cuda_attention, "CANDIDATES", there("reference"))
    monkeypatch.setattr(cuda_attention, "try_out", lambda *_: None)

    first = cuda_attention.attention_for(shape, Execution())

    monkeypatch.setattr(cuda_attention, "CANDIDATES", {})
    assert cuda_attention.attention_for(shape, Execution()) is first


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Have ``importlib`` find these modules, and none of the others that are asked for."""

    def find(name: str) -> Any:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return modules[name]

    monkeypatch.setattr(importlib, "import_module", find)


def test_without_flash_attn_it_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)

    with pytest.raises(ImportError, match="flash_attn"):
        CANDIDATES["flash_attn"](SHAPE, Execution())


def test_flash_attn_2_is_passed_over_for_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, flash_attn=SimpleNamespace())

    with pytest.raises(Unavailable, match="pages of 256 positions, ours have 16"):
        CANDIDATES["flash_attn"](SHAPE, Execution())


def paged(
    q: Tensor, cache: tuple[Tensor, Tensor], contexts: Tensor, tables: Tensor, scale: float
) -> Tensor:
    """Attend to pages as the libraries do, by plain torch."""
    new = q.size(0) - len(contexts) + 1  # of the first sequence; the others bring one token
    lengths = [(int(contexts[0]) - new, new), *((int(n) - 1, 1) for n in contexts[1:])]
    *_, batch = trial_step(SHAPE, lengths)
    batch.block_tables.copy_(tables)
    return reference.attention(q, *cache, batch, scale)


def test_flash_attn_3_is_given_our_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_with_kvcache(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        assert named["causal"]
        assert named["cu_seqlens_q"].tolist() == [0, 5, 6]
        assert named["max_seqlen_q"] == 5
        contexts, tables = named["cache_seqlens"], named["page_table"]
        return paged(q, (k, v), contexts, tables, named["softmax_scale"])

    module = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    installed(monkeypatch, flash_attn_interface=module)
    step = trial_step(SHAPE, [(30, 5), (17, 1)])

    found = CANDIDATES["flash_attn"](SHAPE, Execution())(*step, 0.1)

    assert torch.equal(found, reference.attention(*step, 0.1))


def test_the_varlen_attention_of_torch_is_given_our_pages_and_one_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def varlen_attn(
        *places: Any, block_table: Tensor, seqused_k: Tensor, scale: float, **named: Any
    ) -> Tensor:
        q, k, v, starts, _, most, longest = places
        assert named == {"num_splits": 1, "window_size": (-1, 0), "enable_gqa": True}
        assert (starts.tolist(), most, longest) == ([0, 5, 6], 5, 48)
        return paged(q, (k, v), seqused_k, block_table, scale)

    installed(
        monkeypatch, **{"torch.nn.attention.varlen": SimpleNamespace(varlen_attn=varlen_attn)}
    )
    step = trial_step(SHAPE, [(30, 5), (17, 1)])

    found = CANDIDATES["torch"](SHAPE, Execution())(*step, 0.1)

    assert torch.equal(found, reference.attention(*step, 0.1))


def unpaged(q: Any, k: Any, v: Any) -> None:
    """Stand for ``varlen_attn`` as torch 2.11 has it."""


class PrivateOperator:
    """``aten::_flash_attention_forward`` on the CPU, with no pages."""

    def __init__(self, schema: str) -> None:
        self.default = SimpleNamespace(_schema=schema)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **named: Any) -> Any:
        """Attend to each sequence's part of what was packed."""
        starts, places, most, longest, dropout, is_causal, _ = arguments
        assert (most, dropout, is_causal) == (5, 0.0, True)
        assert places.tolist() == [longest * at for at in range(len(starts))]
        out = torch.empty_like(q)
        for at, context in enumerate(named["seqused_k"].tolist()):
            rows = slice(int(starts[at]), int(starts[at + 1]))
            there = slice(int(places[at]), int(places[at]) + context)
            out[rows] = reference._attend(q[rows], k[there], v[there], named["scale"])
        return out, None


@pytest.fixture
def older_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make torch one that has the private operator with a schema, and no pages."""

    def become(schema: str) -> None:
        module = SimpleNamespace(varlen_attn=unpaged)
        installed(monkeypatch, **{"torch.nn.attention.varlen": module})
        operators = SimpleNamespace(_flash_attention_forward=PrivateOperator(schema))
        monkeypatch.setattr(torch, "ops", SimpleNamespace(aten=operators))

    return become


def test_torch_2_11_copies_contexts_out_of_their_pages_where_it_is_named(
    older_torch: Callable[[str], None],
) -> None:
    older_torch("(..., Tensor? seqused_k=None)")
    step = trial_step(SHAPE, [(30, 5), (17, 1)])

    found = CANDIDATES["torch"](SHAPE, Execution(attention="torch"))(*step, 0.1)

    assert torch.equal(found, reference.attention(*step, 0.1))


@pytest.mark.parametrize(
    ("schema", "attention", "reason"),
    [
        ("(Tensor? seqused_k=None)", "auto", "no pages before torch 2.12"),
        ("(Tensor query)", "torch", "no lengths"),
    ],
)
def test_an_older_torch_is_passed_over(
    older_torch: Callable[[str], None], schema: str, attention: str, reason: str
) -> None:
    older_torch(schema)

    with pytest.raises(Unavailable, match=reason):
        CANDIDATES["torch"](SHAPE, Execution(attention=attention))


@pytest.mark.parametrize("name", ["flash_attn", "torch"])
def test_the_libraries_compute_in_16_bits_only(name: str) -> None:
    with pytest.raises(Unavailable, match="the model in torch"):
        CANDIDATES[name](WIDE, Execution())


def test_triton_that_is_not_installed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without_triton(name: str, *arguments: Any, **named: Any) -> Any:
        fromlist = arguments[2] if len(arguments) > 2 else ()
        if "triton_attention" in (fromlist or ()):
            raise ModuleNotFoundError("No module named 'triton'")
        return found(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_triton)

    choice = choose(WIDE, Execution(), CANDIDATES, try_out)

    assert choice.prompts is reference.attention


def shifted(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    return reference.attention(q, keys, values, batch, scale) + 1


def broken(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image\nsecond line")


def silent(q: Tensor, *_: Any) -> Tensor:
    return torch.full_like(q, torch.nan)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (shifted, "by 1"),
        (silent, "by nan"),
        (broken, "RuntimeError: no kernel image"),
    ],
)
def test_a_trial_finds_an_attention_that_does_not_work(attend: Attend, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason) as raised:
        try_out(attend, SHAPE)

    assert "\n" not in str(raised.value)


def test_plain_torch_refuses_before_it_spoils_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    asked: Any = SimpleNamespace(is_cuda=True)  # nothing else of it is looked at

    with pytest.raises(RuntimeError, match="asks the device"):
        reference.attention(asked, asked, asked, asked, 1.0)


def test_a_trial_lets_pass_what_agrees() -> None:
    def fine(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
        return reference.attention(q, keys, values, batch, scale)

    try_out(fine, SHAPE)
    try_out(reference.attention, SHAPE)
