"""What a checkpoint declares of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.pooling import pooling_of_gguf
from tiny_models import random_model, saved_model, write_gguf

ALL_OFF: dict[str, Any] = {
    "word_embedding_dimension": 64,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
    "include_prompt": True,
}


def declare(directory: Path, pooling: dict[str, Any]) -> None:
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("pooling", "means"),
    [
        ({**ALL_OFF, "pooling_mode_lasttoken": True}, "last"),
        ({**ALL_OFF, "pooling_mode_mean_tokens": True}, "mean"),
        ({**ALL_OFF, "pooling_mode_cls_token": True}, None),
        ({**ALL_OFF, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}, None),
        (ALL_OFF, None),
        ({}, None),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "weightedmean"}, None),
        ({"pooling_mode": ["mean"]}, None),
    ],
)
def test_a_directory_declares_its_pooling(
    tmp_path: Path, pooling: dict[str, Any], means: str | None
) -> None:
    saved_model(tmp_path, "qwen3")
    declare(tmp_path, pooling)

    assert Checkpoint.open(tmp_path).pooling == means


def test_most_directories_declare_none(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3")

    assert Checkpoint.open(tmp_path).pooling is None


def test_a_layer_behind_the_pooling_is_not_passed_over(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3")
    declare(tmp_path, {**ALL_OFF, "pooling_mode_lasttoken": True})
    (tmp_path / "2_Dense").mkdir()

    assert Checkpoint.open(tmp_path).pooling is None


def test_a_damaged_declaration_is_refused_in_words(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3")
    declare(tmp_path, {})
    (tmp_path / "1_Pooling" / "config.json").write_text("{")

    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json is not valid JSON"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("kind", "means"), [(0, None), (1, "mean"), (2, None), (3, "last"), (4, None)]
)
def test_a_gguf_file_declares_its_pooling(tmp_path: Path, kind: int, means: str | None) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model("qwen3"), "F32", qwen3__pooling_type=kind)

    assert Checkpoint.open(tmp_path / "tiny.gguf").pooling == means


@pytest.mark.parametrize("kind", [None, [3], "last", True, 3.0])
def test_pooling_that_is_no_number_is_none(kind: Any) -> None:
    metadata = {"general.architecture": "qwen3", "qwen3.pooling_type": kind}

    assert pooling_of_gguf(metadata) is None
