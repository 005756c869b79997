"""A hub is asked with patience, and what it says is not trusted further than needed."""

import asyncio
import email.utils
import random
import time
from collections.abc import AsyncIterator

import pytest

from cortex.ipc.downloads import HubAccess, RepoFile
from cortex.ipc.errors import Unloadable
from cortex.runtime import hub_client as module
from cortex.runtime.hub_client import HubClient, Patience
from cortex.runtime.hub_files import HubSource, Listing
from fake_hub import COMMIT, FakeHub

REPO = "acme/tiny"
SOURCE = HubSource(REPO)
CONTENT = random.Random(5).randbytes(300_000)
PATIENT = Patience(attempts=3, first_seconds=1.0, longest_seconds=60.0)
SECRET = "hf_secret"


class Sleeps:
    """Notes how long somebody would have slept."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    files = {"config.json": b"{}", "a.safetensors": CONTENT, "empty.txt": b""}
    async with FakeHub({REPO: files}) as fake:
        yield fake


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


def client(
    hub: FakeHub, sleeps: Sleeps, token: str | None = None, patience: Patience = PATIENT
) -> HubClient:
    return HubClient(HubAccess(hub.url, token), patience, sleeps)


async def listed(hub: FakeHub, sleeps: Sleeps, source: HubSource = SOURCE) -> Listing:
    async with client(hub, sleeps) as asking:
        return await asking.listing(source)


async def refusal(
    hub: FakeHub, sleeps: Sleeps, source: HubSource = SOURCE, token: str | None = None
) -> Unloadable:
    with pytest.raises(Unloadable) as refused:
        async with client(hub, sleeps, token) as asking:
            await asking.listing(source)
    return refused.value


async def content(
    hub: FakeHub, sleeps: Sleeps, *, start: int = 0, name: str = "a.safetensors"
) -> bytes:
    """Return a file from *start* on."""
    async with client(hub, sleeps) as asking:
        file = (await asking.listing(SOURCE)).files[name]
        chunks = asking.chunks(SOURCE, COMMIT, file, start, file.size_bytes)
        return b"".join([chunk async for chunk in chunks])


# listing


async def test_a_listing_has_sizes_and_hashes(hub: FakeHub, sleeps: Sleeps) -> None:
    found = await listed(hub, sleeps)

    large = found.files["a.safetensors"]
    assert found.commit == COMMIT
    assert set(found.files) == {"config.json", "a.safetensors", "empty.txt"}
    assert (large.size_bytes, large.sha256) == (len(CONTENT), large.blob)
    assert found.files["config.json"].sha256 is None


async def test_a_listing_in_pages_is_read_to_its_end(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.page = 1

    assert len((await listed(hub, sleeps)).files) == 3


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", COMMIT])
async def test_a_revision_may_be_any_name(hub: FakeHub, sleeps: Sleeps, revision: str) -> None:
    assert (await listed(hub, sleeps, HubSource(REPO, revision))).commit == COMMIT


async def test_a_mirror_that_names_another_host_for_its_pages_is_asked_itself(
    hub: FakeHub, sleeps: Sleeps
) -> None:
    hub.page, hub.pages_at = 1, "http://localhost:1"

    assert len((await listed(hub, sleeps)).files) == 3


async def test_pages_without_an_end_are_given_up(
    hub: FakeHub, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PAGES", 2)
    hub.page = 1

    assert "without an end" in str(await refusal(hub, sleeps))


@pytest.mark.parametrize(
    ("entry", "is_kept"),
    [
        ({"path": "../../evil", "oid": "0" * 40}, False),
        ({"path": "/etc/passwd", "oid": "0" * 40}, False),
        ({"path": "a", "oid": "../../evil"}, False),
        ({"path": "a", "oid": "0" * 40, "lfs": {"oid": "../evil", "size": 1}}, False),
        ({"path": "a", "oid": "0" * 40, "size": -1}, False),
        ({"path": "a", "oid": "0" * 40, "lfs": {"oid": "sha256:" + "0" * 64, "size": 1}}, True),
    ],
)
async def test_a_file_that_could_lead_out_of_the_cache_is_not_there(
    hub: FakeHub, sleeps: Sleeps, entry: dict[str, object], is_kept: bool
) -> None:
    hub.listing = [entry]

    assert bool((await listed(hub, sleeps)).files) is is_kept


async def test_a_next_page_that_is_nowhere_is_refused(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.page, hub.pages_at = 1, "http://[::1"

    assert (await refusal(hub, sleeps)).kind == "hub_failed"


@pytest.mark.parametrize("listing", [{}, [{"path": 5}], ["a"], b"<html>", b"[" * 100_000])
async def test_what_is_no_listing_is_refused(hub: FakeHub, sleeps: Sleeps, listing: object) -> None:
    hub.listing = listing

    assert (await refusal(hub, sleeps)).kind == "hub_failed"


@pytest.mark.parametrize("commit", ["main", "../../x", ""])
async def test_what_is_no_commit_is_refused(hub: FakeHub, sleeps: Sleeps, commit: str) -> None:
    hub.commit = commit

    assert "names no commit" in str(await refusal(hub, sleeps))


async def test_a_listing_without_measure_is_not_read(
    hub: FakeHub, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LISTING_BYTES", 50)

    assert "absurdly long" in str(await refusal(hub, sleeps))


# refusals


async def test_a_repository_that_is_not_there_is_named(hub: FakeHub, sleeps: Sleeps) -> None:
    refused = await refusal(hub, sleeps, HubSource("acme/huge"))

    assert refused.kind == "repo_not_found"
    assert "no repository acme/huge, or does not show it to anybody without a token" in str(refused)


@pytest.mark.parametrize("says_why", [True, False])
async def test_a_revision_that_is_not_there_is_named(
    hub: FakeHub, sleeps: Sleeps, says_why: bool
) -> None:
    hub.says_why = says_why

    refused = await refusal(hub, sleeps, HubSource(REPO, "v9"))

    assert (refused.kind, "has no 'v9' of acme/tiny" in str(refused)) == (
        "revision_not_found",
        True,
    )


async def test_a_hub_that_does_not_say_what_it_misses_has_no_repository(
    hub: FakeHub, sleeps: Sleeps
) -> None:
    hub.says_why = False

    assert (await refusal(hub, sleeps, HubSource("acme/huge"))).kind == "repo_not_found"


@pytest.mark.parametrize("says_why", [True, False])
async def test_a_gated_repository_says_whom_to_ask(
    hub: FakeHub, sleeps: Sleeps, says_why: bool
) -> None:
    hub.is_gated, hub.says_why = True, says_why

    refused = await refusal(hub, sleeps, token=SECRET)

    assert refused.kind == "gated"
    assert "does not let this token into acme/tiny: its owner" in str(refused)
    assert SECRET not in str(refused)


@pytest.mark.parametrize(
    ("token", "words"), [(None, "asks for a token"), ("wrong", "refuses the token")]
)
async def test_a_token_that_is_needed_is_asked_for(
    hub: FakeHub, sleeps: Sleeps, token: str | None, words: str
) -> None:
    hub.token = SECRET

    refused = await refusal(hub, sleeps, token=token)

    assert (refused.kind, words in str(refused)) == ("unauthorized", True)
    assert "token_file" in str(refused)


async def test_an_answer_that_no_hub_gives_is_refused(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.failures = [(418, {})]

    assert "answers 418" in str(await refusal(hub, sleeps))


async def test_what_is_refused_for_good_is_not_tried_again(hub: FakeHub, sleeps: Sleeps) -> None:
    await refusal(hub, sleeps, HubSource("acme/huge"))

    assert len(hub.received) == 1


async def test_nobody_at_the_endpoint_is_said_in_words(sleeps: Sleeps) -> None:
    async with FakeHub({}) as gone:
        pass

    refused = await refusal(gone, sleeps)

    assert refused.kind == "network_unreachable"
    assert str(refused).startswith(f"the hub {gone.url} cannot be reached: Connect")
    assert len(sleeps.seconds) == PATIENT.attempts - 1


# the token


async def test_the_token_goes_to_the_hub(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.token = SECRET

    async with client(hub, sleeps, SECRET) as asking:
        assert (await asking.listing(SOURCE)).commit == COMMIT


async def test_the_token_does_not_go_on_to_the_host_of_large_files(
    hub: FakeHub, sleeps: Sleeps
) -> None:
    hub.redirects = True
    async with client(hub, sleeps, SECRET) as asking:
        file = (await asking.listing(SOURCE)).files["a.safetensors"]
        await asking.read(SOURCE, COMMIT, file, 10)

    first, second = hub.contents("a.safetensors")
    assert (first.host.split(":")[0], first.authorization) == ("127.0.0.1", f"Bearer {SECRET}")
    assert (second.host.split(":")[0], second.authorization) == ("localhost", None)
    assert second.range == "bytes=0-9"


def test_the_token_is_not_shown() -> None:
    assert SECRET not in repr(HubAccess("https://hub", SECRET))


def test_a_proxy_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside")

    assert module._proxy_for("https://huggingface.co") == "http://proxy:3128"
    assert module._proxy_for("https://inside") is None
    assert module._proxy_for("http://huggingface.co") is None


# patience


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_may_pass_is_tried_again_ever_more_slowly(
    hub: FakeHub, sleeps: Sleeps, status: int
) -> None:
    hub.failures = [(status, {}), (status, {})]

    await listed(hub, sleeps)

    first, second = sleeps.seconds
    assert 0.75 <= first <= 1.0
    assert 1.5 <= second <= 2.0


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limited"), (503, "hub_failed")])
async def test_what_does_not_pass_is_given_up(
    hub: FakeHub, sleeps: Sleeps, status: int, kind: str
) -> None:
    hub.failures = [(status, {})] * PATIENT.attempts

    refused = await refusal(hub, sleeps)

    assert (refused.kind, f"answers {status}" in str(refused)) == (kind, True)
    assert len(hub.received) == PATIENT.attempts


async def test_a_hub_says_when_to_come_back(hub: FakeHub, sleeps: Sleeps) -> None:
    date = email.utils.formatdate(time.time() + 30)
    hub.failures = [(429, {"Retry-After": "7"}), (503, {"Retry-After": date})]

    await listed(hub, sleeps)

    assert sleeps.seconds[0] == 7
    assert 0 < sleeps.seconds[1] <= 30


async def test_nobody_waits_for_a_hub_that_wants_an_hour(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.failures = [(429, {"Retry-After": "3600"})]

    assert (await refusal(hub, sleeps)).kind == "rate_limited"
    assert sleeps.seconds == []


@pytest.mark.parametrize("said", ["soon", "\u00b2", "Fri, 31 Dec 99999 23:59:59 GMT"])
async def test_a_retry_after_that_says_nothing_is_ignored(
    hub: FakeHub, sleeps: Sleeps, said: str
) -> None:
    hub.failures = [(429, {"Retry-After": said})]

    await listed(hub, sleeps)

    assert sleeps.seconds[0] <= 1.0


# content


async def test_a_file_comes_whole(hub: FakeHub, sleeps: Sleeps) -> None:
    assert await content(hub, sleeps) == CONTENT


async def test_an_empty_file_needs_no_request(hub: FakeHub, sleeps: Sleeps) -> None:
    assert await content(hub, sleeps, name="empty.txt") == b""
    assert hub.contents("empty.txt") == []


async def test_a_broken_connection_goes_on_from_the_byte_it_reached(
    hub: FakeHub, sleeps: Sleeps
) -> None:
    hub.manners["a.safetensors"].cuts = [1000, 50_000]

    assert await content(hub, sleeps) == CONTENT

    starts = [int((one.range or "").split("=")[1].split("-")[0]) for one in hub.received[2:]]
    assert starts == [0, 1000, 51_000]


async def test_a_connection_that_breaks_every_time_is_given_up(
    hub: FakeHub, sleeps: Sleeps
) -> None:
    hub.manners["a.safetensors"].cuts = [10] * 50

    with pytest.raises(Unloadable) as refused:
        await content(hub, sleeps)

    assert refused.value.kind == "network_unreachable"
    assert len(hub.contents("a.safetensors")) == PATIENT.attempts


async def test_a_connection_that_brings_much_may_break_often(
    hub: FakeHub, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRESS_BYTES", 10_000)
    hub.manners["a.safetensors"].cuts = [40_000] * 7

    assert await content(hub, sleeps) == CONTENT


async def test_a_hub_that_goes_silent_is_asked_again(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.manners["a.safetensors"].stops = [1000]
    impatient = Patience(attempts=3, silence_seconds=0.1)
    async with client(hub, sleeps, patience=impatient) as asking:
        file = (await asking.listing(SOURCE)).files["a.safetensors"]
        data = await asking.read(SOURCE, COMMIT, file, file.size_bytes)

    assert data == CONTENT
    assert len(hub.contents("a.safetensors")) == 2


async def test_a_hub_without_ranges_is_read_from_its_start(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.manners["a.safetensors"].ignores_ranges = True

    assert await content(hub, sleeps, start=123_456) == CONTENT[123_456:]


@pytest.mark.parametrize("ignores_ranges", [True, False])
async def test_a_file_of_another_length_than_listed_is_refused(
    hub: FakeHub, sleeps: Sleeps, ignores_ranges: bool
) -> None:
    hub.manners["a.safetensors"].replaced_by = CONTENT + b"more"
    hub.manners["a.safetensors"].ignores_ranges = ignores_ranges

    with pytest.raises(Unloadable) as refused:
        await content(hub, sleeps)

    assert refused.value.kind == "checksum_mismatch"
    assert refused.value.extras["got"] == len(CONTENT) + 4


async def test_a_file_that_ends_before_its_range_is_refused(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.manners["a.safetensors"].replaced_by = b"short"

    with pytest.raises(Unloadable, match="less of a file") as refused:
        await content(hub, sleeps, start=100)

    assert refused.value.kind == "checksum_mismatch"


async def test_another_range_than_asked_for_is_not_taken(hub: FakeHub, sleeps: Sleeps) -> None:
    hub.manners["a.safetensors"].content_range = f"bytes 5-10/{len(CONTENT)}"

    with pytest.raises(Unloadable, match="another range"):
        await content(hub, sleeps)


async def test_a_listed_file_that_is_gone_is_said_so(hub: FakeHub, sleeps: Sleeps) -> None:
    async with client(hub, sleeps) as asking:
        with pytest.raises(Unloadable) as refused:
            await asking.read(SOURCE, COMMIT, RepoFile("gone.txt", 5, "0" * 40), 5)

    assert refused.value.kind == "file_not_found"
