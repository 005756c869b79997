"""The text side of whole checkpoints: prompts, ends, defaults, answers."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from cortex.ipc.errors import InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.openai import ChatMessage
from cortex.runtime.chat import ChatOptions
from cortex.runtime.conversation import Conversation
from cortex.runtime.text import GenerationDefaults, TextSide
from tiny_text import TINY_LLAMA, metadata_of, trained, with_bos, write_gguf

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = [ChatMessage(role="user", content="What is the capital of France?")]


def gguf_side(path: Path, *, template: Any = CHATML, **more: Any) -> TextSide:
    """The text side of a GGUF file written to *path*."""
    metadata = TINY_LLAMA | metadata_of(trained("smollm"), "smollm", **more)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return TextSide.from_checkpoint(write_gguf(path / "tiny.gguf", metadata))


def prompt_ids(
    side: TextSide, messages: Sequence[ChatMessage] = QUESTION, **more: Any
) -> list[int]:
    """The tokens of a conversation."""
    return side.chat_prompt(Conversation(messages, **more)).token_ids


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of transformers: a tiny random Llama with a tokenizer that writes BOS."""
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=700,
        eos_token_id=5,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.generation_config.update(
        eos_token_id=[7, 8], do_sample=True, temperature=0.6, top_p=0.9, top_k=40
    )
    model.save_pretrained(tmp_path)
    with_bos(trained("llama-bpe")).save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, chat_template="{{ bos_token }}" + CHATML)
    return tmp_path


def write_config(path: Path, **config: Any) -> None:
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(defaults | config))


# the embedded model


@pytest.fixture(scope="module")
def embedded(embedded_model: Path) -> TextSide:
    return TextSide.from_checkpoint(embedded_model)


def test_the_embedded_models_prompt_equals_the_reference(
    embedded: TextSide, embedded_model: Path
) -> None:
    reference: Any = transformers.AutoTokenizer.from_pretrained(
        embedded_model.parent, gguf_file=embedded_model.name
    )
    messages = [{"role": m.role, "content": m.content} for m in QUESTION]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert prompt_ids(embedded) == expected


def test_the_embedded_model_ends_a_turn_and_recommends_nothing(embedded: TextSide) -> None:
    assert embedded.stop_token_ids == (embedded.tokenizer.id_of("<|im_end|>"),)
    assert embedded.generation == GenerationDefaults()


def test_an_answer_comes_back_as_text_without_its_end(embedded: TextSide) -> None:
    ids = embedded.tokenizer.encode("Paris 😀.<|im_end|>")

    detokenizer = embedded.detokenizer()

    assert "".join(detokenizer.add([i]) for i in ids) + detokenizer.flush() == "Paris 😀."


def test_control_tokens_that_a_user_writes_are_read_as_such(embedded: TextSide) -> None:
    ids = prompt_ids(embedded, [ChatMessage(role="user", content="<|im_end|>")])

    assert ids.count(2) == 3  # the system turn's, the user's own, the template's


def test_reading_it_does_not_import_torch(embedded_model: Path) -> None:
    code = (
        "import sys, pathlib; from cortex.runtime.text import TextSide; "
        "TextSide.from_checkpoint(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code, str(embedded_model)], check=False)

    assert done.returncode == 0


# GGUF files


def test_a_sequence_ends_at_every_end_a_file_knows(tmp_path: Path) -> None:
    side = gguf_side(tmp_path, eos_token_id=4, eot_token_id=5, eom_token_id=6)

    im_end = side.tokenizer.id_of("<|im_end|>")
    assert side.stop_token_ids == (4, 5, 6, im_end)


def test_what_ends_a_sequence_is_hidden_though_it_is_no_control_token(tmp_path: Path) -> None:
    side = gguf_side(tmp_path, eos_token_id=40)

    assert side.detokenizer().add([40, *side.tokenizer.encode("a")]) == "a"


def test_a_usual_end_that_the_template_does_not_write_is_no_end(tmp_path: Path) -> None:
    side = gguf_side(tmp_path, template=CHATML)

    assert side.tokenizer.id_of("<|endoftext|>") not in side.stop_token_ids


def test_without_a_template_one_cannot_chat(tmp_path: Path) -> None:
    side = gguf_side(tmp_path, template=None)

    with pytest.raises(UnsupportedParameter, match="use /v1/completions"):
        prompt_ids(side)


def test_a_plain_text_begins_with_bos_where_the_file_asks_for_it(tmp_path: Path) -> None:
    side = gguf_side(tmp_path, add_bos_token=True)

    bos = side.tokenizer.id_of("<|endoftext|>")
    assert side.text_prompt("a") == [bos, *side.tokenizer.encode("a")]
    assert bos not in prompt_ids(side)


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    side = gguf_side(tmp_path, template=CHATML + "{{ extra }}")

    assert side.tokenizer.decode(prompt_ids(side, template_kwargs={"extra": "!"})).endswith("!")


def test_a_template_argument_may_have_any_name(tmp_path: Path) -> None:
    side = gguf_side(tmp_path)

    odd = {"self": 1, "not a name": 2}

    assert prompt_ids(side, template_kwargs=odd) == prompt_ids(side)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    side = gguf_side(tmp_path)

    with pytest.raises(InvalidRequest, match="half a surrogate pair") as refused:
        side.text_prompt("a\ud800")

    assert refused.value.param == "prompt"


def test_how_embeddings_are_made_is_what_the_checkpoint_declares(tmp_path: Path) -> None:
    metadata = TINY_LLAMA | metadata_of(trained("smollm"), "smollm")
    mean = metadata | {"llama.pooling_type": 1}

    assert TextSide.from_checkpoint(write_gguf(tmp_path / "a.gguf", metadata)).pooling is None
    assert TextSide.from_checkpoint(write_gguf(tmp_path / "b.gguf", mean)).pooling == "mean"


def test_a_model_without_a_template_neither_reasons_nor_takes_tools(tmp_path: Path) -> None:
    side = gguf_side(tmp_path, template=None)

    assert (side.reasons, side.takes_tools, side.takes_effort) == (False, False, False)


def test_what_the_operator_settled_reaches_the_chat(tmp_path: Path) -> None:
    side = gguf_side(tmp_path)
    options = ChatOptions(tool_prompt="hermes", reasoning_parser="think")

    settled = TextSide.from_checkpoint(tmp_path / "tiny.gguf", options)

    assert (side.takes_tools, side.reasons) == (False, False)
    assert (settled.takes_tools, settled.reasons) == (True, True)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unloadable, match="chat_template is no string") as refused:
        gguf_side(tmp_path, template=7)

    assert refused.value.kind == "corrupt_checkpoint"


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"something else")

    with pytest.raises(Unloadable, match="not a GGUF file") as refused:
        TextSide.from_checkpoint(tmp_path / "tiny.gguf")

    assert refused.value.kind == "corrupt_checkpoint"


# directories


def test_a_directorys_prompts_equal_the_reference(directory: Path) -> None:
    reference: Any = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": m.role, "content": m.content} for m in QUESTION]
    side = TextSide.from_checkpoint(directory)

    assert (
        prompt_ids(side)
        == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )
    assert side.text_prompt("a b") == reference("a b")["input_ids"]


def test_bos_is_not_doubled_where_the_template_writes_it(directory: Path) -> None:
    side = TextSide.from_checkpoint(directory)

    bos = side.tokenizer.id_of("<|endoftext|>")
    assert prompt_ids(side).count(bos or -1) == 1


def test_a_directorys_ends_and_defaults_are_read(directory: Path) -> None:
    side = TextSide.from_checkpoint(directory)

    assert side.stop_token_ids == (7, 8, side.tokenizer.id_of("<|im_end|>"))
    assert side.generation == GenerationDefaults(temperature=0.6, top_p=0.9, top_k=40)


def test_the_models_configuration_names_the_end_where_nothing_else_does(directory: Path) -> None:
    (directory / "generation_config.json").unlink()

    side = TextSide.from_checkpoint(directory)

    assert side.stop_token_ids == (5, side.tokenizer.id_of("<|im_end|>"))
    assert side.generation == GenerationDefaults()


def test_a_template_file_wins_over_the_configuration(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[-1].content }}!")

    side = TextSide.from_checkpoint(directory)

    assert side.tokenizer.decode(prompt_ids(side)).endswith("France?!")


def test_of_several_templates_the_default_is_taken(directory: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "{{ messages }}"},
        {"name": "default", "template": "{{ messages[-1].content }}!"},
    ]
    write_config(directory, chat_template=templates)

    side = TextSide.from_checkpoint(directory)

    assert side.tokenizer.decode(prompt_ids(side)).endswith("France?!")


def test_a_directory_may_have_no_template(directory: Path) -> None:
    write_config(directory)

    assert TextSide.from_checkpoint(directory).chat is None


def test_a_directory_may_have_no_tokenizer_configuration(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()

    side = TextSide.from_checkpoint(directory)

    assert side.chat is None
    assert side.stop_token_ids == (7, 8)


def test_a_template_file_that_cannot_be_read_is_refused(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")

    with pytest.raises(Unloadable, match=r"chat_template\.jinja: cannot be read"):
        TextSide.from_checkpoint(directory)


def test_a_template_of_another_type_is_refused(directory: Path) -> None:
    write_config(directory, chat_template={"default": "x"})

    with pytest.raises(Unloadable, match="chat_template is no string"):
        TextSide.from_checkpoint(directory)


# generation_config.json


def test_a_file_that_says_not_to_sample_means_greedy() -> None:
    config = {"do_sample": False, "temperature": 0.6}

    assert GenerationDefaults.of(config) == GenerationDefaults(temperature=0.0)


@pytest.mark.parametrize(
    "config",
    [{"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"top_k": -5}, {"top_p": True}],
)
def test_defaults_that_make_no_sense_are_refused(directory: Path, config: dict[str, Any]) -> None:
    (directory / "generation_config.json").write_text(json.dumps(config))

    with pytest.raises(Unloadable, match=f"generation_config.json: {next(iter(config))} is"):
        TextSide.from_checkpoint(directory)


def test_a_long_prompt_leaves_the_interpreter_to_others_while_it_is_tokenised(
    tmp_path: Path,
) -> None:
    side, text = gguf_side(tmp_path), "a long prompt " * 100_000
    ended: list[float] = []
    others: list[float] = []

    def tokenise() -> None:
        side.text_prompt(text)
        ended.append(time.monotonic())

    thread = threading.Thread(target=tokenise)
    thread.start()
    while thread.is_alive():
        others.append(time.monotonic())
        time.sleep(0.001)

    assert sum(at < ended[0] for at in others) > 10  # 1 or 2 where the library keeps the lock
