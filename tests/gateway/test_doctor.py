"""``cortex doctor``: what it says of a gateway that is well, and of servers that are not."""

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cortex.gateway import cli, doctor
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Anthropic, Entitlements, Key
from cortex.gateway.doctor import CHECKS, Client, Report, examined, subject_of
from cortex.gateway.doctor_check import Check, NotTried, Subject
from cortex.gateway.doctor_wire import Wire
from cortex.gateway.terminal import Unreachable
from cortex.ipc.errors import NodeFailed
from cortex.ipc.openai_answers import ModelEntry
from doctors_neuron import ObedientNeuron
from fakes import FakeNeuron, gateway_config
from scripted_server import Reply, ScriptedServer
from typed import invoked

SUBJECT = Subject("m", 4096, ("m",))
ALIASED = Catalogue({"m": Profile("m")}, {"claude-small": "m"})
LISTED = {"object": "list", "data": [{"id": "m", "created": 0, "owned_by": "x", "loaded": True}]}
WELL: Reply = (200, {"choices": []})


@pytest.fixture
def neuron() -> ObedientNeuron:
    return ObedientNeuron("m")


async def report_of(gateway: Gateway, *arguments: str) -> tuple[int, Report]:
    status, out, err = await invoked(gateway, "doctor", "--json", *arguments)
    assert err == ""
    return status, msgspec.json.decode(out, type=Report)


def outcomes(report: Report) -> dict[str, str]:
    return {finding.check: finding.outcome for finding in report.findings}


def test_there_are_checks_of_every_client() -> None:
    assert [*CHECKS] == [client.value for client in Client if client is not Client.ALL]


@pytest.mark.parametrize("client", CHECKS)
async def test_everything_works_with_a_model_that_can_do_everything(
    neuron: ObedientNeuron, client: str
) -> None:
    async with neuron, Gateway(gateway_config(neuron), ALIASED) as gateway:
        status, report = await report_of(gateway, "--client", client, "--model", "m")

    assert {it.check: it.why for it in report.findings if it.outcome != "pass"} == {}
    assert (status, report.ok, report.model) == (0, True, "m")
    assert [finding.check for finding in report.findings] == [it.name for it in CHECKS[client]]


async def test_it_prints_a_table_of_every_client_and_a_verdict(neuron: ObedientNeuron) -> None:
    async with neuron, Gateway(gateway_config(neuron), ALIASED) as gateway:
        status, out, err = await invoked(gateway, "doctor", "--model", "m")

    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "opencode can be used with m: yes"
    assert all(f"{client} can be used with m: yes" in out for client in CHECKS)
    assert sum(line.strip().startswith("models") for line in out.splitlines()) == len(CHECKS)


async def test_what_a_model_cannot_do_is_no_failure_where_the_client_can_do_without(
    neuron: ObedientNeuron,
) -> None:
    neuron.can_embed = neuron.can_fill_in = False
    async with neuron, Gateway(gateway_config(neuron), ALIASED) as gateway:
        openai = await report_of(gateway, "--client", "openai")
        zed = await report_of(gateway, "--client", "zed")

    assert (openai[0], outcomes(openai[1])["embeddings"]) == (0, "not possible")
    assert (zed[0], outcomes(zed[1])["edit prediction: suffix"]) == (0, "not possible")


async def test_an_agent_cannot_do_without_tools(neuron: ObedientNeuron) -> None:
    neuron.can_call = False
    async with neuron, Gateway(gateway_config(neuron), ALIASED) as gateway:
        status, out, _ = await invoked(gateway, "doctor", "--model", "m", "--client", "opencode")

    assert status == 1
    assert "this model knows no tools" in out
    assert out.splitlines()[-1].startswith("opencode can be used with m: no: ")


@pytest.mark.parametrize(
    ("client", "own", "needed"),
    [
        ("claude-code", 12_500, 16_384),
        ("codex", 9200, 12_288),
        ("opencode", 7800, 12_288),
    ],
)
async def test_an_agent_cannot_do_without_room_for_its_own_prompt(
    neuron: ObedientNeuron, client: str, own: int, needed: int
) -> None:
    found = []
    async with neuron, Gateway(gateway_config(neuron)) as gateway:
        for context in (needed - 1, needed):
            neuron.models["m"].context = context
            await gateway.poller.refresh("a")
            found.append(await report_of(gateway, "--client", client))

    (small, report), (enough, _) = found
    assert [small, enough] == [1, 0]
    assert [it.check for it in report.findings if it.is_bad] == ["context"]
    assert report.findings[0].outcome == "not possible"
    assert report.findings[0].why == (
        f"the context is {needed - 1} tokens: its own prompt has about {own}, and with room to "
        f"work in it needs {needed}"
    )


@pytest.mark.parametrize("client", ["claude-code", "codex", "opencode"])
async def test_whether_a_context_that_nobody_knows_is_enough_is_not_tried(
    neuron: ObedientNeuron, client: str
) -> None:
    neuron.models["m"].context = None
    async with neuron, Gateway(gateway_config(neuron)) as gateway:
        status, report = await report_of(gateway, "--client", client)

    assert (status, outcomes(report)["context"]) == (0, "not tried")


async def test_without_an_alias_of_claudes_its_picker_lists_nothing(
    neuron: ObedientNeuron,
) -> None:
    async with neuron, Gateway(gateway_config(neuron)) as gateway:
        status, report = await report_of(gateway, "--client", "claude-code")

    assert (status, outcomes(report)["model discovery"]) == (0, "not possible")


async def test_a_key_goes_along_in_either_header(neuron: ObedientNeuron) -> None:
    keys = Entitlements(require_auth=True, keys=(Key("sk-laptop-1", "laptop"),))
    asked = ("--client", "claude-code", "--api-key", "sk-laptop-1")
    async with neuron, Gateway(gateway_config(neuron, entitlements=keys)) as gateway:
        status, report = await report_of(gateway, *asked)

    assert (status, outcomes(report)["key as x-api-key"]) == (0, "pass")


@pytest.mark.parametrize(("context", "why"), [(None, "not known"), (200_000, "is large")])
async def test_a_prompt_beyond_a_large_context_is_not_tried(
    neuron: ObedientNeuron, context: int | None, why: str
) -> None:
    neuron.models["m"].context = context
    async with neuron, Gateway(gateway_config(neuron)) as gateway:
        status, report = await report_of(gateway, "--client", "claude-code")

    [finding] = [it for it in report.findings if it.check == "prompt is too long"]
    assert (status, finding.outcome) == (0, "not tried")
    assert why in finding.why


async def test_a_cache_that_the_billing_line_defeats_is_noticed() -> None:
    class RemembersOne(ObedientNeuron):
        last = b""

        async def _note(self, request: Any) -> dict[str, Any]:
            body = await super()._note(request)
            said = msgspec.json.encode(body.get("messages"))
            if request.path != "/tokenize":
                self.cached_tokens = 5 if said == self.last else 0
                self.last = said
            return body

    async with RemembersOne("m") as forgetful:
        unstripped = gateway_config(forgetful, anthropic=Anthropic(strip_billing_block=False))
        async with Gateway(unstripped) as gateway:
            status, report = await report_of(gateway, "--client", "claude-code")

    assert (status, outcomes(report)["billing line and the prefix cache"]) == (1, "fail")


async def test_without_a_prefix_cache_the_billing_line_costs_nothing(
    neuron: ObedientNeuron,
) -> None:
    neuron.cached_tokens = 0
    async with neuron, Gateway(gateway_config(neuron)) as gateway:
        _, report = await report_of(gateway, "--client", "claude-code")

    assert outcomes(report)["billing line and the prefix cache"] == "not possible"


def test_a_gateway_that_is_not_there_is_one_sentence_and_1() -> None:
    done = CliRunner().invoke(cli.app, ["doctor", "--endpoint", "http://127.0.0.1:9"])

    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("cortex: no gateway answers at http://127.0.0.1:9")


async def test_a_model_that_is_not_listed_is_one_sentence_and_1(neuron: ObedientNeuron) -> None:
    async with neuron, Gateway(gateway_config(neuron)) as gateway:
        status, out, err = await invoked(gateway, "doctor", "--model", "other")

    assert (status, out) == (1, "")
    assert err.startswith("cortex: the gateway does not list the model 'other'")


async def test_a_model_that_does_not_answer_is_one_sentence_and_1() -> None:
    async with FakeNeuron(["m"]) as neuron, Gateway(gateway_config(neuron)) as gateway:
        neuron.refuses = NodeFailed("the device has died")
        status, out, err = await invoked(gateway, "doctor", "--model", "m")

    assert (status, out) == (1, "")
    assert err == "cortex: 'm' does not answer: 502: the device has died\n"


async def test_a_model_that_breaks_off_is_one_sentence_and_1() -> None:
    async with FakeNeuron(["m"]) as neuron, Gateway(gateway_config(neuron)) as gateway:
        neuron.fails_after_tokens = 1
        status, _, err = await invoked(gateway, "doctor", "--model", "m")

    assert (status, err) == (1, "cortex: 'm' does not answer: the device process has died\n")


def test_a_model_that_chats_and_is_loaded_is_asked_first() -> None:
    cold, loaded, blind = (
        ModelEntry("cold", 0, "x", capabilities=["chat"], context_length=9),
        ModelEntry("loaded", 0, "x", loaded=True),
        ModelEntry("blind", 0, "x", loaded=True, capabilities=["embed"]),
    )

    assert subject_of([cold, loaded, blind], None).model == "loaded"
    assert subject_of([cold, blind], None) == Subject("cold", 9, ("cold", "blind"))
    assert subject_of([cold, blind], "blind").model == "blind"
    with pytest.raises(Unreachable, match="a model that chats"):
        subject_of([blind], None)


@pytest.fixture
def stranger() -> Iterator[ScriptedServer]:
    """A server that lists a model, and then answers with anything but what is asked for."""
    whatever: list[Reply] = [WELL, (200, {"id": 1}), (500, b"<html>"), (200, b"[]")]
    with ScriptedServer(
        {
            "GET /v1/models": [(200, LISTED)],
            "GET /v1/models/m": [(200, {"id": "other"})],
            "POST /v1/chat/completions": whatever,
            "POST /v1/completions": [(200, {"choices": []})],
            "POST /v1/embeddings": [(200, {"data": []})],
            "POST /v1/messages": [(200, {"content": None}), (529, {"error": {"message": "busy"}})],
            "POST /v1/messages?beta=true": [(200, b"null")],
            "POST /v1/responses": [(200, {"id": "resp_1"})],
        }
    ) as server:
        yield server


@pytest.mark.parametrize("client", CHECKS)
def test_what_a_strange_server_answers_fails_with_reasons(
    stranger: ScriptedServer, client: str
) -> None:
    at = ["--endpoint", f"http://127.0.0.1:{stranger.port}", "--client", client]

    done = CliRunner().invoke(cli.app, ["doctor", "--json", *at])

    report = msgspec.json.decode(done.stdout, type=Report)
    assert (done.exit_code, report.ok, done.stderr) == (1, False, "")
    by_outcome = {finding.outcome for finding in report.findings}
    assert by_outcome <= {"fail", "not tried", "not possible", "pass"}
    assert sum(finding.outcome == "fail" for finding in report.findings) >= 2
    assert all(finding.why for finding in report.findings)


async def test_a_check_that_does_not_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits(wire: Wire, subject: Subject) -> str:
        await asyncio.Event().wait()
        return ""

    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.01)
    async with Wire("http://127.0.0.1:9", {}) as wire:
        finding = await examined("codex", Check("waits", waits), wire, SUBJECT)

    assert (finding.outcome, finding.why) == ("fail", "it did not end within 0 s")


async def test_an_answer_of_another_shape_is_a_failure() -> None:
    async def looks(wire: Wire, subject: Subject) -> str:
        return str(msgspec.json.decode(b"{}")["usage"])

    async with Wire("http://127.0.0.1:9", {}) as wire:
        finding = await examined("codex", Check("looks", looks), wire, SUBJECT)

    assert (finding.outcome, finding.is_bad) == ("fail", True)
    assert finding.why == "an answer has another shape: KeyError: 'usage'"


async def test_what_is_not_tried_is_no_failure() -> None:
    async def leaves(wire: Wire, subject: Subject) -> str:
        raise NotTried("too long")

    async with Wire("http://127.0.0.1:9", {}) as wire:
        finding = await examined("codex", Check("leaves", leaves), wire, SUBJECT)

    assert (finding.outcome, finding.why, finding.is_bad) == ("not tried", "too long", False)


async def test_a_connection_that_breaks_is_an_answer_of_its_own() -> None:
    async with Wire("http://127.0.0.1:9", {}) as wire:
        reply = await wire.get("/v1/models")

    assert reply.status == 0
    assert reply.refusal.startswith("no answer: the connection broke")
