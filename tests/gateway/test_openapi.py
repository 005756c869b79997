"""``/openapi.json`` of the gateway is what its application is made of."""

import json
from typing import Any

import aiohttp
import jsonschema_rs
import msgspec
import pytest
from aiohttp import web

from cortex.gateway.app import Gateway, build_app
from cortex.gateway.config import Entitlements, Key
from cortex.gateway.route_table import CORTEX
from cortex.ipc import errors
from cortex.ipc.openapi import document
from cortex.ipc.version import BUILD
from fakes import gateway_config

SAID: dict[str, Any] = msgspec.json.decode(document(CORTEX, "1"))
OPERATIONS = [
    (method, path, item[method])
    for path, item in SAID["paths"].items()
    for method in sorted(item.keys() - {"parameters"})
]
EVERY = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o[0]} {o[1]}")
REQUESTS = [
    (path, item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"])
    for path, item in SAID["paths"].items()
    if "post" in item
]
KEYS = Entitlements(require_auth=True, keys=(Key("sk-laptop-1", "laptop"),))


def schema(name: str) -> Any:
    """Return the component that the reference, or the name, *name* means."""
    return SAID["components"]["schemas"][name.rpartition("/")[2]]


def served(app: web.Application) -> set[tuple[str, str]]:
    """Return the methods and paths that *app* answers; HEAD comes with GET."""
    found = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
    }
    return {(m, path) for m, path in found if m != "HEAD" or ("GET", path) not in found}


async def test_every_route_of_the_application_is_in_it_and_no_other() -> None:
    async def more(_: web.Request) -> web.Response:
        return web.Response()

    app = build_app(Gateway(gateway_config()).services())
    written = {(method.upper(), path) for method, path, _ in OPERATIONS}

    assert served(app) == written

    app.router.add_get("/{one:.+}/more", more)
    assert served(app) - written == {("GET", "/{one}/more")}


async def test_it_is_served_to_everybody(session: aiohttp.ClientSession) -> None:
    async with (
        Gateway(gateway_config(entitlements=KEYS)) as gateway,
        session.get(gateway.url + "/openapi.json") as response,
    ):
        body = await response.read()

    assert response.headers["Content-Type"] == "application/json"
    assert body == document(CORTEX, BUILD.package_version)
    assert json.loads(body)["info"]["version"] == BUILD.package_version


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(SAID)
    meant = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}

    assert meant <= SAID["components"]["schemas"].keys()


@pytest.mark.parametrize("name", SAID["components"]["schemas"])
def test_every_schema_is_one_of_json_schema(name: str) -> None:
    whole = {"$ref": f"#/components/schemas/{name}", "components": SAID["components"]}

    jsonschema_rs.Draft202012Validator(whole)


@EVERY
def test_an_operation_has_words_and_answers(operation: tuple[str, str, Any]) -> None:
    *_, said = operation

    assert said["description"]
    assert "500" in said["responses"]
    assert any(int(status) < 300 for status in said["responses"])


def test_operations_have_different_names() -> None:
    names = [said["operationId"] for *_, said in OPERATIONS]

    assert len(set(names)) == len(names)


def test_what_is_answered_without_a_key_says_so() -> None:
    public = {(m, path) for m, path, said in OPERATIONS if said.get("security") == []}

    assert public == {
        ("get", "/"),
        ("head", "/api/hello"),
        ("get", "/health"),
        ("get", "/openapi.json"),
    }
    assert all(("401" in said["responses"]) == ((m, p) not in public) for m, p, said in OPERATIONS)


@EVERY
def test_a_refusal_has_the_envelope_of_its_path_and_names_its_codes(
    operation: tuple[str, str, Any],
) -> None:
    _, path, said = operation
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    of_code = {kind.code: kind.status for kind in kinds if issubclass(kind, errors.ApiError)}

    for status, answer in said["responses"].items():
        if int(status) < 400:
            continue
        refusal = answer["content"]["application/json"]["schema"]
        for envelope in refusal.get("anyOf", [refusal]):
            reference, narrowed = envelope["allOf"]
            codes = narrowed["properties"]["error"]["properties"]["code"]["enum"]
            assert {of_code[code] for code in codes} <= {int(status), 503}
            is_of_anthropic = reference["$ref"].endswith("/AnthropicError")
            assert is_of_anthropic or not path.startswith("/v1/messages")
            assert not (is_of_anthropic and path.startswith("/v1/chat"))


def test_what_is_overloaded_is_529_to_anthropics_clients_only() -> None:
    of_messages, of_chat = (
        SAID["paths"][path]["post"]["responses"]
        for path in ("/v1/messages", "/v1/chat/completions")
    )

    assert of_messages["529"]["description"] == "Overloaded: overloaded"
    assert "overloaded" not in of_messages["503"]["description"]
    assert "overloaded" in of_chat["503"]["description"]
    assert "529" not in of_chat


@pytest.mark.parametrize(
    ("path", "event"),
    [
        ("/v1/chat/completions", "ChatCompletionChunk"),
        ("/v1/completions", "Completion"),
        ("/v1/messages", "MessageEvent"),
        ("/v1/responses", "ResponseEvent"),
    ],
)
def test_a_stream_is_described_with_its_events(path: str, event: str) -> None:
    content = SAID["paths"][path]["post"]["responses"]["200"]["content"]

    described, error = content["text/event-stream"]["x-event-schema"]["anyOf"]
    assert described["$ref"].endswith(f"/{event}")
    assert "error" in schema(error["$ref"])["properties"]


@pytest.mark.parametrize(("path", "reference"), REQUESTS)
def test_a_request_takes_nothing_that_it_does_not_name(path: str, reference: str) -> None:
    assert schema(reference)["additionalProperties"] is False, path


def test_only_a_message_needs_max_tokens() -> None:
    assert "max_tokens" in schema("MessagesBody")["required"]
    assert "max_tokens" not in schema("CountTokensBody")["required"]
