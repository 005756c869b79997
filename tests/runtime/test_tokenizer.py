"""Token for token the reference's ids.

The reference is transformers. Two of its tokenizers serve as oracle:

* for every cutting rule, a PreTrainedTokenizerFast over a tokenizer.json whose pre-tokeniser is
  spelled as the published file spells it (the vocabulary is small and trained here);
* for the embedded model, transformers' own conversion of the GGUF file. It ignores
  ``tokenizer.ggml.pre``, which for this model only says where numerals are cut, so on text without
  numerals both must agree; numerals have the first oracle and a test of their own.
"""

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders

from cortex.ipc.errors import Unloadable
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.runtime.pre_tokenizers import PRE_TOKENIZERS
from cortex.runtime.tokenizer import Tokenizer
from tiny_text import PUBLISHED, SPECIALS, USER_DEFINED, metadata_of, trained, with_bos

TEXTS = {
    "code": "def f(x):\n\tif x >= 10:\n        return {'a': x**2}  # don't\n\n\n",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 🇫🇷 👍🏽",
    "cjk": "日本語の文章です。東京は1200万人。 中文、也有。 한국어도 있습니다.",
    "right to left": "שָׁלוֹם עולם — مرحبًا بالعالم \u200f123\u200f",
    "control characters": "\x00\x01\x1b[31m\x7f\u200b\u2028\ufeff\r\n\t \v",
    "spaces": "  a   b\u00a0c \n \n  d  ",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_st art|>",
    "user-defined tokens": "x<think>y  indent  z</think>",
    "digits": "1 12 123 1234 12345.67 x1y22",
    "combining": "e\u0301 n\u0303 \u1100\u1161 \u0915\u094d\u0937",
    "contractions": "I'm you'LL we'd'VE 'tis",
    "empty": "",
}

any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPECIALS, *USER_DEFINED, " ", "\n", "'s", "é", "e\u0301", "12", "日", "😀"])
).map("".join)
without_numerals = any_text.map(
    lambda text: "".join(c for c in text if unicodedata.category(c)[0] != "N")
)


ARABIC_AND_OTHER_NUMERALS = "\u0663\u0664\u00bd\u2167"


def gguf_of(metadata: dict[str, Any]) -> GGUFFile:
    """A file whose header holds *metadata*."""
    return GGUFFile(Path("tiny.gguf"), metadata, {})


@cache
def from_gguf(pre: str) -> Tokenizer:
    return Tokenizer.from_gguf(gguf_of(metadata_of(trained(pre), pre)))


@cache
def reference(pre: str) -> Any:
    tokenizer = with_bos(trained(pre)) if pre == "llama-bpe" else trained(pre)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call] # it has no annotations


def ids_of(oracle: Any, text: str, *, with_bos: bool = False) -> list[int]:
    ids: list[int] = oracle(text, add_special_tokens=with_bos)["input_ids"]
    return ids


def write_directory(path: Path, tokenizer: Any, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(defaults | config))
    return path


# from inside a GGUF


def test_every_cutting_rule_has_an_oracle_here() -> None:
    assert set(PRE_TOKENIZERS) == set(PUBLISHED)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("pre", PUBLISHED)
def test_ids_equal_the_reference(pre: str, text: str) -> None:
    assert from_gguf(pre).encode(text) == ids_of(reference(pre), text)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_ids_of_any_text_equal_the_reference(pre: str) -> None:
    @given(any_text)
    def holds(text: str) -> None:
        assert from_gguf(pre).encode(text, with_bos=True) == ids_of(
            reference(pre), text, with_bos=True
        )

    holds()


@given(any_text)
def test_text_comes_back_unchanged_where_nothing_is_normalised(text: str) -> None:
    ids = from_gguf("smollm").encode(text)

    shown = b"".join(from_gguf("smollm").bytes_of(i) for i in ids)

    assert shown.decode() == text


@given(st.lists(st.integers(0, 700)))
def test_decoding_any_ids_equals_the_reference(ids: list[int]) -> None:
    oracle = trained_smollm()

    assert from_gguf("smollm").decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@cache
def trained_smollm() -> Any:
    return trained("smollm")


def test_the_rules_differ_where_they_should() -> None:
    ids = {pre: len(from_gguf(pre).encode("1234567")) for pre in ("smollm", "llama-bpe")}

    assert ids["smollm"] == 7
    assert ids["llama-bpe"] < 7


def test_control_tokens_are_hidden_and_user_defined_ones_are_shown() -> None:
    tokenizer = from_gguf("smollm")

    text = tokenizer.decode(tokenizer.encode("a<|im_end|>b<think>c"))

    assert text == "ab<think>c"
    assert tokenizer.control_ids == {tokenizer.id_of(token) for token in SPECIALS}


def test_an_id_beyond_the_vocabulary_has_no_text() -> None:
    assert from_gguf("smollm").decode([10**6]) == ""


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "a"),
        ({"add_bos_token": True}, "<|endoftext|>a"),
        ({"add_eos_token": True}, "a<|im_end|>"),
        ({"add_bos_token": True, "add_eos_token": True}, "<|endoftext|>a<|im_end|>"),
        ({"add_bos_token": True, "bos_token_id": None}, "a"),
    ],
)
def test_a_plain_text_gets_the_ends_the_file_asks_for(more: dict[str, Any], expected: str) -> None:
    metadata = metadata_of(trained("smollm"), "smollm", **more)
    tokenizer = Tokenizer.from_gguf(gguf_of(metadata))

    ids = tokenizer.encode("a", with_bos=True)

    assert b"".join(tokenizer.bytes_of(i) for i in ids).decode() == expected
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


def test_the_roles_of_special_tokens_are_known_to_templates() -> None:
    assert from_gguf("smollm").special_tokens == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
    }


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"model": "llama"}, "tokenizer_unsupported", "of the kind 'llama'"),
        ({"pre": "deepseek-v3"}, "tokenizer_unsupported", "'deepseek-v3'; supported: smollm"),
        ({"pre": None}, "tokenizer_unsupported", "pre is None"),
        ({"tokens": None}, "corrupt_checkpoint", "tokens is missing"),
        ({"tokens": [1, 2]}, "corrupt_checkpoint", "tokens is missing or of the wrong type"),
        ({"tokens": ["a", "a"]}, "corrupt_checkpoint", "a token twice"),
        ({"merges": ["ab"]}, "corrupt_checkpoint", "no pair"),
        ({"merges": ["nowhere tobefound"]}, "corrupt_checkpoint", "cannot be read"),
        ({"token_type": [3]}, "corrupt_checkpoint", "differ in length"),
        ({"eos_token_id": 10**6}, "corrupt_checkpoint", "eos_token_id is 1000000"),
        ({"bos_token_id": "1"}, "corrupt_checkpoint", "bos_token_id is '1'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(
    more: dict[str, Any], kind: str, words: str
) -> None:
    metadata = metadata_of(trained("smollm"), "smollm", **more)

    with pytest.raises(Unloadable, match=words) as refused:
        Tokenizer.from_gguf(gguf_of(metadata))

    assert refused.value.kind == kind


# the embedded model


@pytest.fixture(scope="module")
def embedded(embedded_model: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile.open(embedded_model))


@pytest.fixture(scope="module")
def embedded_reference(embedded_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(
        embedded_model.parent, gguf_file=embedded_model.name
    )


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_embedded_models_ids_equal_the_reference(
    embedded: Tokenizer, embedded_reference: Any, text: str
) -> None:
    assert embedded.encode(text) == ids_of(embedded_reference, text)


@given(text=without_numerals)
def test_the_embedded_models_ids_of_any_text_equal_the_reference(
    embedded: Tokenizer, embedded_reference: Any, text: str
) -> None:
    assert embedded.encode(text) == ids_of(embedded_reference, text)


@given(text=any_text)
def test_the_embedded_model_gives_text_back_save_bytes_it_has_no_token_for(
    embedded: Tokenizer, text: str
) -> None:
    known = b"".join(embedded.bytes_of(i) for i in range(17, 300))

    shown = b"".join(embedded.bytes_of(i) for i in embedded.encode(text))

    assert shown == bytes(byte for byte in text.encode() if byte in known)


def test_numerals_of_every_script_are_cut_one_by_one(embedded: Tokenizer) -> None:
    one_by_one = [embedded.encode(numeral) for numeral in ARABIC_AND_OTHER_NUMERALS]

    assert embedded.encode(ARABIC_AND_OTHER_NUMERALS) == [i for ids in one_by_one for i in ids]


# from a directory


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_directorys_ids_equal_the_reference(tmp_path: Path, text: str) -> None:
    path = write_directory(tmp_path, with_bos(trained("llama-bpe")))
    oracle = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = Tokenizer.from_directory(path)

    assert tokenizer.encode(text) == ids_of(oracle, text)
    assert tokenizer.encode(text, with_bos=True) == ids_of(oracle, text, with_bos=True)


def test_tokens_that_only_the_configuration_declares_are_found(tmp_path: Path) -> None:
    tokenizer = trained("qwen2")
    declared = {
        str(tokenizer.get_vocab_size()): {"content": "<|tool|>", "special": True},
        str(tokenizer.token_to_id("<think>")): {"content": "<think>", "special": False},
    }
    path = write_directory(tmp_path, tokenizer, added_tokens_decoder=declared)
    oracle = transformers.AutoTokenizer.from_pretrained(path)

    ids = Tokenizer.from_directory(path).encode("a<|tool|>b<think>")

    assert ids == ids_of(oracle, "a<|tool|>b<think>")
    assert tokenizer.get_vocab_size() in ids


def test_a_declared_id_that_is_taken_is_refused(tmp_path: Path) -> None:
    declared = {"5": {"content": "<|tool|>", "special": True}}
    path = write_directory(tmp_path, trained("qwen2"), added_tokens_decoder=declared)

    with pytest.raises(Unloadable, match=r"gives '<\|tool\|>' the id 5"):
        Tokenizer.from_directory(path)


def test_special_tokens_may_be_declared_as_text_or_as_an_object(tmp_path: Path) -> None:
    path = write_directory(
        tmp_path, trained("qwen2"), bos_token=None, eos_token={"content": "<|im_end|>"}
    )

    assert Tokenizer.from_directory(path).special_tokens == {"eos_token": "<|im_end|>"}


def test_a_directory_without_a_configuration_has_a_tokenizer_all_the_same(tmp_path: Path) -> None:
    write_directory(tmp_path, trained("qwen2"))
    (tmp_path / "tokenizer_config.json").unlink()

    assert Tokenizer.from_directory(tmp_path).special_tokens == {}


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unloadable, match=r"no readable tokenizer\.json: .*No such file") as refused:
        Tokenizer.from_directory(tmp_path)

    assert refused.value.kind == "tokenizer_unsupported"


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    tokenizer = trained("qwen2")
    tokenizer.decoder = decoders.Metaspace()
    path = write_directory(tmp_path, tokenizer)

    with pytest.raises(Unloadable, match="only byte-level"):
        Tokenizer.from_directory(path)


def test_a_tokenizer_file_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"decoder": {"type": "ByteLevel"}}')

    with pytest.raises(Unloadable, match="cannot be read") as refused:
        Tokenizer.from_directory(tmp_path)

    assert refused.value.kind == "corrupt_checkpoint"


def test_an_added_token_of_other_characters_than_the_alphabets_keeps_its_text(
    tmp_path: Path,
) -> None:
    tokenizer = trained("qwen2")
    tokenizer.add_tokens([AddedToken("日本\u3000語", normalized=False)])
    ours = Tokenizer.from_directory(write_directory(tmp_path, tokenizer))

    assert ours.decode(ours.encode("a 日本\u3000語 b")) == "a 日本\u3000語 b"
