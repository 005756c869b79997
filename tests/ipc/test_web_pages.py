"""Which web pages may speak to a daemon that asks for no key."""

import pytest

from cortex.ipc.errors import ForeignPage
from cortex.ipc.web_pages import Asked, OpenDaemon, check_not_foreign

EVIL = "http://evil.example"
HERE = "127.0.0.1:31313"
VERB = "/fleet/nodes/x/drain"
CHAT = "/v1/chat/completions"


def daemon(*allowed: str, on_loopback: bool = True) -> OpenDaemon:
    return OpenDaemon(on_loopback, allowed, ("/fleet/",), "set require_auth")


def is_let_in(asked: Asked, by: OpenDaemon) -> bool:
    try:
        check_not_foreign(asked, by)
    except ForeignPage:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        (None, True),
        ("localhost", True),
        ("localhost:31313", True),
        ("LocalHost.:31313", True),
        ("cortex.localhost:1", True),
        ("127.0.0.1", True),
        ("127.1.2.3:9", True),
        ("[::1]", True),
        ("[::1]:31313", True),
        ("cortex.lan", True),
        ("Cortex.LAN:443", True),
        ("evil.example", False),
        ("evil.example:31313", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("www.cortex.lan", False),
        ("evil@localhost", False),
        ("localhost:31313@evil.example", False),
        ("10.0.0.1", False),
        ("[::2]:31313", False),
        ("[::1", False),
        ("\udcff", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_on_loopback_the_host_is_this_machine_or_allowed(
    method: str, host: str | None, is_ours: bool
) -> None:
    asked = Asked(method, "/health", host, None)

    assert is_let_in(asked, daemon("cortex.LAN")) is is_ours


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_elsewhere_every_host_will_do(method: str) -> None:
    assert is_let_in(Asked(method, VERB, "gpu7.lan:31313", None), daemon(on_loopback=False))


@pytest.mark.parametrize(
    ("origin", "may_act"),
    [
        (None, True),
        ("http://localhost:3000", True),
        ("https://localhost", True),
        ("http://127.0.0.1:5173", True),
        ("http://[::1]:5173", True),
        ("http://tauri.localhost", True),
        ("https://chat.lan", True),
        ("app://obsidian.md", True),
        ("file://", True),
        ("tauri://localhost", True),
        ("vscode-webview://1a2b", True),
        ("capacitor://localhost", True),
        (EVIL, False),
        ("https://evil.example:31313", False),
        ("http://localhost.evil.example", False),
        ("http://10.0.0.1", False),
        ("chrome-extension://localhost", False),
        ("apps://x", False),
        ("localhost", False),
        ("null", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("on_loopback", [True, False])
def test_no_page_of_elsewhere_changes_anything(
    origin: str | None, may_act: bool, on_loopback: bool
) -> None:
    asked = Asked("POST", VERB, HERE, origin)

    assert is_let_in(asked, daemon("chat.lan", on_loopback=on_loopback)) is may_act


@pytest.mark.parametrize(("origin", "may_ask"), [("null", True), (EVIL, False)])
def test_a_page_without_an_origin_may_ask_models(origin: str, may_ask: bool) -> None:
    assert is_let_in(Asked("POST", CHAT, HERE, origin), daemon()) is may_ask


@pytest.mark.parametrize(
    ("host", "is_same"),
    [("GPU7.lan:31313", True), ("gpu7.lan:80", False), ("gpu7.lan", False), (None, False)],
)
def test_a_page_of_the_daemon_s_own_address_may_act(host: str | None, is_same: bool) -> None:
    asked = Asked("POST", VERB, host, "http://gpu7.lan:31313")

    assert is_let_in(asked, daemon(on_loopback=False)) is is_same


@pytest.mark.parametrize(
    ("method", "is_harmless"),
    [("GET", True), ("HEAD", True), ("OPTIONS", True), ("PUT", False), ("DELETE", False)],
)
def test_what_only_looks_may_come_from_any_page(method: str, is_harmless: bool) -> None:
    assert is_let_in(Asked(method, "/fleet", HERE, EVIL), daemon()) is is_harmless


@pytest.mark.parametrize(("host", "origin"), [("evil.example", None), (HERE, EVIL)])
def test_a_refusal_says_what_to_do(host: str, origin: str | None) -> None:
    with pytest.raises(ForeignPage, match=r"evil\.example.*") as refused:
        check_not_foreign(Asked("POST", VERB, host, origin), daemon())

    assert "set require_auth" in str(refused.value)
    assert "allowed_hosts" in str(refused.value)
