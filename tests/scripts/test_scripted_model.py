"""The script behind ``scripts/scripted-neuron``: what it says to what."""

from scripted_model import left_of, script

TOOLS = (
    "<|im_start|>system\nTools:\n<tools>\n"
    '{"type": "function", "function": {"name": "look", "parameters": {}}}\n'
    '{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", '
    '"properties": {"command": {"type": "string"}}, "required": ["command"]}}}\n'
    "</tools>\nResults come between <tool_response> and </tool_response>.<|im_end|>\n"
)
ASKS = "<|im_start|>user\nHello<|im_end|>\n"
ANSWERS = "<|im_start|>assistant\n"


def test_it_greets() -> None:
    assert script(ASKS + ANSWERS) == "Hello there, friend!"


def test_it_calls_a_shell_that_is_offered_with_what_that_requires() -> None:
    said = script(TOOLS + ASKS + ANSWERS)

    assert '{"name":"bash","arguments":{"command":"echo cortex was here"}}' in said


def test_it_repeats_the_result_of_a_tool() -> None:
    result = "<|im_start|>user\n<tool_response>\nfine\nsunny\n</tool_response><|im_end|>\n"

    assert script(TOOLS + ASKS + result + ANSWERS) == "The tool said: sunny"


def test_it_thinks_where_it_is_told_to() -> None:
    asks = "<|im_start|>user\nLet me think.<|im_end|>\n"

    assert script(asks + ANSWERS).startswith("<think>")


def test_what_is_left_does_not_mind_other_white_space() -> None:
    assert left_of('{"a": 1}', '{"a":') == " 1}"
    assert left_of("one\ntwo", "one\n") == "two"


def test_what_is_left_does_not_mind_thoughts_that_were_cut_short() -> None:
    assert left_of("<think>\nWhy?\n</think>\nyes", "<think></think>\ny") == "es"


def test_nothing_is_left_where_something_else_was_said() -> None:
    assert left_of("yes", "n") == ""


def test_it_thinks_where_its_reasoning_is_asked_for() -> None:
    asks = "<|im_start|>user\nWhat is 15 * 37? Show your reasoning.<|im_end|>\n"

    assert script(asks + ANSWERS).startswith("<think>")


def test_it_calls_every_tool_where_it_is_told_to() -> None:
    said = script(TOOLS + "<|im_start|>user\nCall each of your tools.<|im_end|>\n" + ANSWERS)

    first, second = said.split("</tool_call>\n")
    assert '"name":"look"' in first
    assert '"name":"bash"' in second


def test_a_tool_that_is_alone_is_called_whatever_it_is() -> None:
    lines = TOOLS.splitlines(keepends=True)
    alone = "".join(line for line in lines if "bash" not in line)

    assert '{"name":"look","arguments":{}}' in script(alone + ASKS + ANSWERS)
