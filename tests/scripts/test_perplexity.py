"""What scripts/perplexity measures: the engine's log probabilities, format by format."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import pytest
import torch
from perplexity import (
    DENSE,
    Measured,
    compare,
    log_probabilities,
    main,
    requantised,
    table,
    tokens_of,
)
from perplexity_text import TEXT

from tiny_hybrids import random_hybrid, saved_hybrid, write_hybrid_gguf
from tiny_models import loaded, random_llama, reference_logits, some_tokens, write_gguf

TOKENS = some_tokens(90)
KINDS = (DENSE, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0")
MOST = {
    DENSE: 1e-6,
    "Q8_0": 0.008,
    "Q5_1": 0.05,
    "Q5_0": 0.06,
    "Q4_1": 0.10,
    "IQ4_NL": 0.10,
    "Q4_0": 0.12,
}
"""The error of a matrix with normally distributed weights, as a part of their size."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity") / "tiny.gguf"
    write_gguf(path, random_llama(), "F32")
    return path


def expected(logits: torch.Tensor) -> torch.Tensor:
    said = logits.log_softmax(dim=-1)
    return said[torch.arange(len(TOKENS) - 1), torch.tensor(TOKENS[1:])]


def test_log_probabilities_are_those_of_transformers(tiny: Path) -> None:
    reference = random_llama()

    scores = log_probabilities(loaded(tiny), TOKENS)

    torch.testing.assert_close(
        torch.tensor(scores), expected(reference_logits(reference, TOKENS)), rtol=0, atol=1e-3
    )


def test_a_model_with_recurrent_states_is_measured_too(tmp_path: Path) -> None:
    reference = saved_hybrid(tmp_path, "qwen3_5_text")

    scores = log_probabilities(loaded(tmp_path), TOKENS)

    torch.testing.assert_close(
        torch.tensor(scores), expected(reference_logits(reference, TOKENS)), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_stored_anew_with_the_loss_of_the_format(
    tiny: Path, tmp_path: Path, kind: str
) -> None:
    requantised(tiny, tmp_path / "again.gguf", kind)

    before, after = gguf.GGUFReader(tiny), gguf.GGUFReader(tmp_path / "again.gguf")
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        was = torch.from_numpy(gguf.quants.dequantize(old.data, old.tensor_type).copy())
        now = torch.from_numpy(gguf.quants.dequantize(new.data, new.tensor_type).copy())
        assert new.tensor_type.name == (kind if was.dim() == 2 else DENSE)
        loss = ((now - was).norm() / was.norm()).item()
        assert loss <= (MOST[kind] if was.dim() == 2 else 0)
        assert was.dim() == 1 or kind == DENSE or loss > MOST[kind] / 4


def test_what_no_converter_quantises_stays_float32(tmp_path: Path) -> None:
    source, target = tmp_path / "hybrid.gguf", tmp_path / "again.gguf"
    write_hybrid_gguf(source, random_hybrid("qwen3_5_moe_text"), "F32")

    requantised(source, target, "Q8_0")

    kinds = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors if len(t.shape) > 1
    }
    kept = {name.split(".")[2] for name, kind in kinds.items() if kind == DENSE}
    assert kept == {"ssm_conv1d", "ffn_gate_inp"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/"], "perplexity: /: is no regular file"),
        (["--tokens", "1"], "argument --tokens: a number from 2 on"),
        (["--tokens", "-3"], "argument --tokens: a number from 2 on"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["perplexity", *arguments])

    with pytest.raises(SystemExit) as ended:
        main()

    assert words in f"{ended.value}{capsys.readouterr().err}"


def test_the_rest_of_what_a_file_says_stays(tiny: Path, tmp_path: Path) -> None:
    requantised(tiny, tmp_path / "again.gguf", "Q8_0")

    before, after = gguf.GGUFReader(tiny).fields, gguf.GGUFReader(tmp_path / "again.gguf").fields
    kept = {name for name in before if not name.startswith("GGUF.")}
    assert {name: after[name].contents() for name in kept} == {
        name: before[name].contents() for name in kept
    }


def test_each_format_is_a_row_and_the_loss_is_against_float32(tiny: Path) -> None:
    rows = compare(tiny, TOKENS, (DENSE, "Q8_0"))

    assert list(rows) == ["as it is", DENSE, "Q8_0"]
    assert rows["as it is"].perplexity == rows[DENSE].perplexity
    assert rows["Q8_0"].perplexity == pytest.approx(rows[DENSE].perplexity, rel=0.02)
    assert rows["Q8_0"].weights_mib < 0.3 * rows[DENSE].weights_mib
    assert math.isfinite(rows["Q8_0"].seconds)


def test_the_table_is_markdown() -> None:
    rows = {DENSE: Measured(512.4, 20.0, 1.0), "Q4_0": Measured(72.3, 21.0, 1.0)}

    assert table(rows).splitlines()[2:] == [
        "| F32 | 512 | 20.000 | +0.00% |",
        "| Q4_0 | 72 | 21.000 | +5.00% |",
    ]
    assert table({"as it is": rows["Q4_0"]}).endswith("| as it is | 72 | 21.000 |  |")


@pytest.mark.e2e
def test_the_embedded_model_as_shipped_reads_english(embedded_model: Path) -> None:
    token_ids = tokens_of(embedded_model, TEXT)[:120]

    scores = log_probabilities(loaded(embedded_model, dtype="auto"), token_ids)

    assert math.exp(-sum(scores) / len(scores)) == pytest.approx(67.96, rel=0.01)
