"""What an engine serves, as its list says it; all of it pure."""

from typing import Any

import msgspec
import pytest

from cortex.gateway.engine_models import ModelPage, offered
from cortex.ipc.node_api import Limit, ModelInfo


def listed(*entries: dict[str, Any], wanted: tuple[str, ...] | None = None) -> list[ModelInfo]:
    page = msgspec.convert({"object": "list", "data": list(entries)}, ModelPage)
    return offered(page, wanted)


def test_every_entry_is_a_model_that_is_loaded() -> None:
    found = listed({"id": "b", "owned_by": "vllm"}, {"id": "a"}, {"id": "a"})

    assert [(model.id, model.status, model.servable.ok) for model in found] == [
        ("a", "loaded", True),
        ("b", "loaded", True),
    ]


def test_only_wanted_models_are_offered() -> None:
    assert [model.id for model in listed({"id": "a"}, {"id": "b"}, wanted=("b", "c"))] == ["b"]


def test_a_list_that_is_null_is_empty() -> None:
    assert offered(msgspec.convert({"data": None}, ModelPage), None) == []


@pytest.mark.parametrize(
    ("entry", "limit"),
    [
        ({"max_model_len": 8192}, Limit(8192)),
        ({"context_length": 8192, "max_output_tokens": 100}, Limit(8192, None, 100)),
        ({"meta": {"n_ctx_train": 131072}}, Limit(131072)),
        ({"meta": {"n_ctx": 4096, "n_ctx_train": 131072}}, Limit(4096)),
        ({"max_input_tokens": 8000}, Limit(None, 8000)),
        ({"max_model_len": None, "context_length": 0}, None),
        ({"max_model_len": "8192", "meta": []}, None),
        ({"max_model_len": True}, None),
        ({}, None),
    ],
)
def test_a_limit_is_read_where_it_is_told(entry: dict[str, Any], limit: Limit | None) -> None:
    [model] = listed({"id": "a", **entry})

    assert model.limit == limit
