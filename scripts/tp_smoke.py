"""Have several devices share a model and give one token, and say how far that goes.

The same device processes as a neuron's, forked by the same fork server, with nothing around them:

    spawn     a process per device says hello
    ping      each answers
    join      they meet, over NCCL on GPUs, over gloo on CPUs
    check     the sum of rank + 1 is right on every rank
    load      each rank loads its part of the model
    token     the first rank is asked for one, all compute it
    unload    the first rank, then the others, give everything back
    shutdown  all exit with 0

    scripts/tp-smoke                                two ranks on this CPU, a tiny random model
    scripts/tp-smoke --devices cuda:0,cuda:1        two GPUs
    scripts/tp-smoke --devices cpu:0,cpu:1,cpu:2,cpu:3
    scripts/tp-smoke --model /models/Qwen3-8B --devices cuda:0,cuda:1

The last line is ``status=ok``; else it names the step that failed and why, and the exit status is
1. With one device there is no group: the other steps are made all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import zmq.asyncio

from cortex.ipc.log import configure_logging
from cortex.ipc.messages import (
    Bye,
    CheckCollective,
    CollectiveChecked,
    Command,
    Event,
    GroupJoined,
    JoinGroup,
    LoadModel,
    ModelLoaded,
    Ping,
    SamplingParams,
    Shutdown,
    UnloadModel,
)
from cortex.ipc.plan_ring import PlanRing
from cortex.ipc.ring import Flag
from cortex.ipc.settings import ConfigError
from cortex.ipc.taps import Tap
from cortex.runtime import fork_server
from cortex.runtime.config import DeviceConfig, DeviceName, NeuronConfig
from cortex.runtime.device_budget import resolve_devices
from cortex.runtime.device_conversation import Refused
from cortex.runtime.device_life import DeviceLife
from cortex.runtime.device_state import Cause
from cortex.runtime.discovery import NvmlProbe
from cortex.runtime.host import Host

GROUP = "smoke"
MODEL = "smoke-model"
PROMPT = [1, 2, 3]
MIB = 2**20

CommandOf = Callable[[int, int], Command]
"""Of a rank and a command id."""


class Failure(Exception):
    """A step did not do what it should, in words."""


class Rank:
    """One device process, from its hello to its end."""

    def __init__(self, name: str, life: DeviceLife, tasks: asyncio.TaskGroup) -> None:
        self.name = name
        self.life = life
        self._hello = asyncio.Event()
        self._running = tasks.create_task(life.run(lambda _: self._hello.set(), self._hello.set))

    async def said_hello(self) -> int:
        """Return its process number; raise Failure where it ends instead."""
        await self._hello.wait()
        if self.life.pid is None or self._running.done():
            raise Failure((await self._running).reason)
        return self.life.pid

    async def ask(self, question: Callable[[int], Command]) -> Event:
        """Return what answers; raise Failure for a refusal."""
        try:
            return await self.life.conversation.ask(question)
        except Refused as exc:
            raise Failure(f"{self.name}: {exc}") from exc

    def kill(self) -> None:
        """End it, unless it has ended."""
        self.life.kill(Cause.ASKED, "killed by tp-smoke")

    async def end(self) -> str:
        """Return how it ended, in words."""
        return (await self._running).reason


class Smoke:
    """The steps, in order."""

    def __init__(self, ranks: Sequence[Rank], model: Path, dtype: str, meeting: Path) -> None:
        self._ranks = ranks
        self._model = model
        self._dtype = dtype
        self._meeting = meeting
        self._group = GROUP if len(ranks) > 1 else None

    async def spawn(self) -> str:
        """Wait for every hello."""
        pids = [await rank.said_hello() for rank in self._ranks]
        named = zip(self._ranks, pids, strict=True)
        return ", ".join(f"{rank.name} is process {pid}" for rank, pid in named)

    async def ping(self) -> str:
        """Have each answer."""
        await self._ask_all(lambda _, number: Ping(number))
        return f"{len(self._ranks)} answered"

    async def join(self) -> str:
        """Send the ends of a plan ring, and have the ranks meet."""
        if self._group is None:
            return "one device, no group"
        ring = PlanRing(len(self._ranks) - 1)
        for index, rank in enumerate(self._ranks):
            rank.life.post.send(GROUP, ring.descriptors(index))
        ring.close()
        answers = await self._ask_all(
            lambda rank, number: JoinGroup(
                number, GROUP, rank, len(self._ranks), str(self._meeting)
            )
        )
        backends = {answer.backend for answer in answers if isinstance(answer, GroupJoined)}
        return f"over {', '.join(sorted(backends))}"

    async def check(self) -> str:
        """Add up the ranks' numbers."""
        if self._group is None:
            return "one device, nothing to add"
        right = len(self._ranks) * (len(self._ranks) + 1) / 2
        answers = await self._ask_all(lambda _, number: CheckCollective(number, GROUP))
        sums = [answer.observed_sum for answer in answers if isinstance(answer, CollectiveChecked)]
        if sums != [right] * len(self._ranks):
            raise Failure(f"the sums are {sums}, each should be {right:g}")
        return f"the sum is {right:g} on every rank"

    async def load(self) -> str:
        """Have each load its part."""
        answers = await self._ask_all(
            lambda _, number: LoadModel(
                number,
                MODEL,
                str(self._model),
                self._dtype,
                max_context_tokens=256,
                max_sequences=4,
                group=self._group,
            )
        )
        weights = [a.footprint.weights_bytes / MIB for a in answers if isinstance(a, ModelLoaded)]
        return " + ".join(f"{size:.1f}" for size in weights) + " MiB of weights"

    async def token(self) -> str:
        """Ask the first rank for one token."""
        conversation = self._ranks[0].life.conversation
        sampling = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
        async with conversation.generate(MODEL, PROMPT, sampling) as generation:
            records = [record async for batch in generation for record in batch]
        tokens = [record.token_id for record in records if record.flags & Flag.TOKEN]
        if len(tokens) != 1:
            raise Failure(f"one token was asked for, {len(tokens)} came")
        return f"token {tokens[0]}"

    async def unload(self) -> str:
        """Give everything back: the first rank, then the others."""
        for rank in self._ranks:
            await rank.ask(lambda number: UnloadModel(number, MODEL))
        return "everything is given back"

    async def shutdown(self) -> str:
        """Have all exit."""
        answers = await self._ask_all(lambda _, number: Shutdown(number))
        if not all(isinstance(answer, Bye) for answer in answers):
            raise Failure(f"no Bye came, but {answers}")
        ends = [await rank.end() for rank in self._ranks]
        if not all(end.endswith("exited with status 0") for end in ends):
            raise Failure("; ".join(ends))
        return "all exited with status 0"

    async def _ask_all(self, command_of: CommandOf) -> list[Event]:
        """Ask every rank at the same time."""

        async def ask(index: int, rank: Rank) -> Event:
            return await rank.ask(lambda number: command_of(index, number))

        return await asyncio.gather(*(ask(*rank) for rank in enumerate(self._ranks)))


def main() -> int:
    """Make the steps; return the exit status."""
    arguments = _arguments()
    configure_logging("tp-smoke", arguments.log_level)
    fork_server.prepare()
    try:
        return asyncio.run(run(arguments))
    except ConfigError as exc:  # a device that this host has not
        print(f"status=failed step=spawn reason={exc}")
        return 1


async def run(arguments: argparse.Namespace) -> int:
    """Make the steps, one after the other, and print how each went."""
    with tempfile.TemporaryDirectory(prefix="tp-smoke-") as scratch:
        directory = Path(scratch)
        model = arguments.model or random_model(directory / "model")
        (directory / "meeting").mkdir()
        dtype = "bfloat16" if arguments.devices[0].startswith("cuda") else "auto"
        async with ranks_of(arguments.devices, arguments.log_level) as ranks:
            smoke = Smoke(ranks, model, arguments.dtype or dtype, directory / "meeting")
            for step in (
                *(smoke.spawn, smoke.ping, smoke.join, smoke.check),
                *(smoke.load, smoke.token, smoke.unload, smoke.shutdown),
            ):
                began = time.monotonic()
                try:
                    async with asyncio.timeout(arguments.timeout):
                        said = await step()
                except Exception as exc:  # noqa: BLE001 - whatever it is, it is the answer
                    print(f"status=failed step={step.__name__} reason={_words(exc)}")
                    return 1
                took = time.monotonic() - began
                print(f"{step.__name__:<9} ok  {took:7.2f} s  {said}", flush=True)
    print("status=ok")
    return 0


@contextlib.asynccontextmanager
async def ranks_of(names: Sequence[str], log_level: str) -> AsyncIterator[list[Rank]]:
    """Fork a process per device; none is left at the end."""
    settings = NeuronConfig(devices=[DeviceConfig(name) for name in names])
    specs = resolve_devices(settings, NvmlProbe().inventory(), Host.read())
    server, ids = fork_server.ForkServer(), itertools.count(1)
    with zmq.asyncio.Context() as context, contextlib.closing(server):
        lives = {
            spec.name: DeviceLife(
                spec, ids, fork=server.fork, context=context, tap=Tap(None, ""), log_level=log_level
            )
            for spec in specs
        }
        async with asyncio.TaskGroup() as tasks:
            ranks = [Rank(name, life, tasks) for name, life in lives.items()]
            try:
                yield ranks
            finally:
                for rank in ranks:
                    rank.kill()


def random_model(directory: Path) -> Path:
    """Write a tiny llama with random weights that divides among 2, 3, 4, 6 and 8 ranks."""
    heads, head_dim, hidden, inner, vocabulary = 24, 32, 768, 384, 768
    shapes = {
        "model.embed_tokens": (vocabulary, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocabulary, hidden),
        "model.layers.0.input_layernorm": (hidden,),
        "model.layers.0.post_attention_layernorm": (hidden,),
        **{f"model.layers.0.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        "model.layers.0.mlp.gate_proj": (inner, hidden),
        "model.layers.0.mlp.up_proj": (inner, hidden),
        "model.layers.0.mlp.down_proj": (hidden, inner),
    }
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_random(directory / "model.safetensors", shapes)
    return directory


def _write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of normal float32 numbers."""
    draw, header, at = np.random.default_rng(7), {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * 4
        header[f"{name}.weight"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for shape in shapes.values():
            file.write(draw.normal(scale=0.2, size=shape).astype("<f4").tobytes())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/tp-smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--devices",
        type=_names,
        default=["cpu:0", "cpu:1"],
        metavar="NAME,NAME",
        help="the ranks, the first one leads (cpu:0,cpu:1)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a GGUF file, or a directory with config.json and safetensors (a tiny random llama)",
    )
    parser.add_argument(
        "--dtype", help="auto, float32, bfloat16 or float16 (what suits the device)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for each step (120)"
    )
    parser.add_argument("--log-level", default="error", help="of the device processes (error)")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("device names, each once, with commas between them")
    try:
        return msgspec.convert(names, list[DeviceName])
    except msgspec.ValidationError as exc:
        raise argparse.ArgumentTypeError(f"expected cpu:N or cuda:N, not {text}") from exc


def _words(error: Exception) -> str:
    return "it took too long" if isinstance(error, TimeoutError) else str(error) or repr(error)


if __name__ == "__main__":
    sys.exit(main())
