"""Every architecture on several ranks: the logits of one rank, and of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.linear import Projection
from cortex.models.loaded_model import LoadedModel
from cortex.models.parallel import Group
from rank_threads import ThreadCollectives, on_ranks
from tiny_models import (
    Player,
    loaded,
    random_model,
    reference_logits,
    saved_model,
    some_tokens,
    write_gguf,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "tied": {"tie_word_embeddings": True},
    "one key for all": {"num_key_value_heads": 1},
    "a key each": {"num_key_value_heads": 4},
    "a vocabulary that does not divide": {"vocab_size": 101},
}
WIDE: dict[str, Any] = {"head_dim": 32, "intermediate_size": 128, "moe_intermediate_size": 128}
"""Sizes whose quarters are whole blocks of 32."""
THREE: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 128,
    "intermediate_size": 768,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 2,
}
"""Sizes whose halves are whole blocks of 256, but for the inner ones of 3."""


def ranks_of(model_type: str, at: int) -> int:
    """Return 2 and 4 in turn, so that each architecture and each of its variants has both."""
    return (2, 4)[(ARCHITECTURES.index(model_type) + at) % 2]


def steps_of(model: LoadedModel, *, is_recorded: bool = False) -> list[Tensor]:
    """Play a prompt in two chunks, beside another, and decode both."""
    player, tokens = Player(model), some_tokens(30)
    if is_recorded:
        player.compute = model.recorded(player.cache)
    steps = ({"a": tokens[:17], "b": some_tokens(9, seed=1)}, {"b": [7], "a": tokens[17:]})
    logits = [{k: v.clone() for k, v in player.step(**step).items()} for step in steps]
    return [torch.cat([of_step[name] for of_step in logits]) for name in "ab"]


def logits_on_ranks(path: Path, ranks: int, dtype: str = "float32") -> list[list[Tensor]]:
    """Return the logits that each of *ranks* ranks computes."""
    return on_ranks(ranks, lambda group: steps_of(loaded(path, dtype=dtype, group=group)))


def assert_equal_to_one_rank(path: Path, reference: Any, ranks: int) -> None:
    """Hold all ranks to each other, to one rank alone and to transformers' model."""
    alone, expected = steps_of(loaded(path)), reference_logits(reference, some_tokens(30))

    by_rank = logits_on_ranks(path, ranks)

    for logits in by_rank:
        assert all(map(torch.equal, logits, by_rank[0]))
    for found, of_one in zip(by_rank[0], alone, strict=True):
        torch.testing.assert_close(found, of_one, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), of_one.argmax(-1))
    torch.testing.assert_close(by_rank[0][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "variant", "ranks"),
    [(m, v, ranks_of(m, at)) for m in ARCHITECTURES for at, v in enumerate(VARIANTS)],
)
def test_ranks_give_the_logits_of_one(
    tmp_path: Path, model_type: str, variant: str, ranks: int
) -> None:
    reference = saved_model(tmp_path, model_type, **VARIANTS[variant])

    assert_equal_to_one_rank(tmp_path, reference, ranks)


@pytest.mark.parametrize(
    ("model_type", "kind", "ranks"),
    [(m, k, ranks_of(m, at)) for m in ARCHITECTURES for at, k in enumerate(("F16", "Q8_0"))],
)
def test_ranks_of_a_gguf_file_give_the_logits_of_one(
    tmp_path: Path, model_type: str, kind: str, ranks: int
) -> None:
    reference = random_model(model_type, **WIDE)
    write_gguf(tmp_path / "tiny.gguf", reference, kind)

    assert_equal_to_one_rank(tmp_path / "tiny.gguf", reference, ranks)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_ranks_with_packed_products_give_the_logits_of_one(tmp_path: Path, model_type: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model(model_type, **WIDE), "Q8_0")
    alone = steps_of(loaded(tmp_path / "tiny.gguf", dtype="auto"))

    first, second = logits_on_ranks(tmp_path / "tiny.gguf", 2, "auto")

    for logits, others, of_one in zip(first, second, alone, strict=True):
        assert torch.equal(logits, others)
        torch.testing.assert_close(logits, of_one, rtol=2e-3, atol=2e-3)
        assert torch.cosine_similarity(logits.flatten(), of_one.flatten(), dim=0) > 0.99999


@pytest.mark.parametrize(("model_type", "word"), [("llama", "mlp"), ("qwen3_moe", "experts")])
def test_ranks_that_share_three_blocks_give_the_logits_of_one(
    tmp_path: Path, model_type: str, word: str
) -> None:
    reference = random_model(model_type, **THREE)
    write_gguf(tmp_path / "tiny.gguf", reference, "Q4_K")

    for rank, inner in enumerate((512, 256)):
        held = loaded(tmp_path / "tiny.gguf", group=Group(rank, 2)).module
        assert [
            child.weight.columns if isinstance(child, Projection) else child.columns
            for name, child in held.named_modules()
            if name.endswith(f"{word}.down_proj")
        ] == [inner] * 2
    assert_equal_to_one_rank(tmp_path / "tiny.gguf", reference, 2)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_recorded_step_of_a_rank_has_the_bits_of_the_model(
    tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved_model(tmp_path, model_type)
    plain = logits_on_ranks(tmp_path, 2)

    recorded = on_ranks(2, lambda group: steps_of(loaded(tmp_path, group=group), is_recorded=True))

    for found, expected in zip(recorded, plain, strict=True):
        assert all(map(torch.equal, found, expected))
    assert not caplog.records


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "held"),
    [(2, 4, (2, 2)), (2, 1, (1, 1)), (4, 2, (1, 1, 1, 1))],
)
def test_a_rank_keeps_keys_of_the_heads_it_reads(
    tmp_path: Path, ranks: int, kv_heads: int, held: tuple[int, ...]
) -> None:
    saved_model(tmp_path, "llama", num_key_value_heads=kv_heads)

    models = [loaded(tmp_path, group=Group(rank, ranks)) for rank in range(ranks)]

    assert tuple(model.caches.kv_heads for model in models) == held


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_layer_sums_over_the_ranks_twice(tmp_path: Path, model_type: str) -> None:
    saved_model(tmp_path, model_type)

    def calls(group: Group) -> int:
        assert isinstance(group.collectives, ThreadCollectives)
        Player(loaded(tmp_path, group=group)).step(a=some_tokens(5))
        return group.collectives.calls

    assert on_ranks(2, calls) == [2 * 3 + 2] * 2  # and embedding and head


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_token_outside_the_vocabulary_is_an_error_on_every_rank(
    tmp_path: Path, model_type: str
) -> None:
    reference = saved_model(tmp_path, model_type)

    def fails(group: Group) -> bool:
        model = loaded(tmp_path, group=group)
        with pytest.raises(IndexError):
            Player(model).step(a=[reference.config.vocab_size])
        return True

    assert on_ranks(2, fails) == [True, True]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 96}, "3 key-value h"),
        ({"num_key_value_heads": 1, "num_attention_heads": 5, "hidden_size": 60}, "5 query heads"),
        ({"intermediate_size": 97}, "97 does not divide among 2 ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_in_words(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    saved_model(tmp_path, "llama", **changes)

    with pytest.raises(CheckpointError, match=says):
        loaded(tmp_path, group=Group(0, 2))


def test_a_rank_that_fails_ends_the_others() -> None:
    def run(group: Group) -> Tensor:
        if group.rank == 1:
            raise ValueError("rank 1 has no more")
        assert group.collectives
        return group.collectives.all_reduce(torch.ones(1, 1))

    with pytest.raises(ValueError, match="rank 1 has no more"):
        on_ranks(3, run)
