"""``neuron serve | check | tap``: what can be wrong is a sentence and an exit code, no traceback.

Exit codes: 0 stopped as asked, 1 something outside is in the way, 2 the configuration is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console

from cortex.ipc import taps
from cortex.ipc.log import configure_logging
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.settings import ConfigError
from cortex.ipc.version import BUILD
from cortex.runtime.config import load_config, parse_devices
from cortex.runtime.device_budget import resolve_devices
from cortex.runtime.host import Host

INTERRUPTED = 130

app = typer.Typer(
    name="neuron",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Serve language models on the devices of this host.

\b
  neuron serve                                  defaults: 127.0.0.1:13131, every GPU or cpu:0
  neuron serve --model smollm2-135m-instruct    load the small embedded model at once
  neuron check org/name                         what a model would take, and whether it fits
  neuron tap                                    watch what a running neuron does
""",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"neuron {BUILD.package_version}")
        raise typer.Exit


@app.callback()
def _neuron(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Configuration; /etc/neuron/neuron.toml where it exists."),
]

Devices = Annotated[
    str | None, typer.Option(metavar="NAMES", help="auto, or names: cuda:0,cuda:1 or cpu:0.")
]


@app.command()
def serve(
    config: Config = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 is any.")
    ] = None,
    devices: Devices = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Load at the start instead of the file's; repeatable."),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")
    ] = None,
) -> None:
    """Run the neuron in the foreground until SIGTERM or Ctrl-C; a second one hurries it.

    \b
    Options win over the environment (NEURON_LISTEN, NEURON_ADMISSION__MAX_IN_FLIGHT, ...), which
    wins over the file. Without a file the defaults serve.

    \b
      neuron serve --config ./neuron.toml
      neuron serve --devices cpu:0,cpu:1 --listen 127.0.0.1:8000
      neuron serve --model file:/models/SmolLM2-135M-Instruct.Q4_1.gguf

    \b
    Then ask it, as any OpenAI server:
      curl http://127.0.0.1:13131/v1/chat/completions -d '{"model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    """  # noqa: D301 - \b is click's mark for lines that it must not wrap
    try:
        settings = load_config(
            config,
            listen=listen,
            devices=None if devices is None else parse_devices(devices),
            models=[{"model_id": model_id} for model_id in model] if model else None,
            log_level=log_level,
        )
        configure_logging("neuron", settings.log_level)
        from cortex.runtime import fork_server

        fork_server.prepare()  # its import of torch is the longest way to the first token
        from cortex.runtime import serving

        serving.serve(settings)
    except ConfigError as exc:
        _fail(str(exc), 2)
    except OSError as exc:
        _fail(str(exc), 1)
    except KeyboardInterrupt:  # before the loop took over the signal
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As in --model of serve.")],
    *,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="TAG",
            help="A GGUF file of the repository (Q4_K_M...), else what dense weights become while "
            "they are loaded (q8_0, q4_0, q4_1, q5_0, q5_1, fp8).",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Devices that share the model.")
    ] = None,
    max_context_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=16, help="Instead of the model's own.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICES",
            help="Indices of those that share the model (0,1), or as in --devices of serve.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print numbers for programs.")] = False,
    config: Config = None,
) -> None:
    """Say what a load of MODEL would take and where it would fit; nothing is loaded.

    \b
    Of a model at a hub only the headers are fetched, not the weights. A running neuron is not
    needed, and not asked: what it holds counts as used.

    \b
      neuron check Qwen/Qwen3-0.6B
      neuron check Qwen/Qwen3-0.6B-GGUF --quant Q8_0 --max-context-tokens 8192
      neuron check Qwen/Qwen3-32B --quant fp8 --tensor-parallel 2
      neuron check file:/models/SmolLM2-135M-Instruct.Q4_1.gguf --devices cpu:0
      neuron check smollm2-135m-instruct --json

    \b
    Exit status: 0 it can be loaded now, 1 it cannot, 2 the question was wrong.
    """  # noqa: D301 - as above
    from cortex.runtime import check as checking
    from cortex.runtime.serving import Surroundings

    try:
        indices = _indices(devices)
        named = None if devices is None or indices is not None else parse_devices(devices)
        settings = load_config(config, devices=named)
        configure_logging("neuron", settings.log_level)
        host = Surroundings.look()
        specs = resolve_devices(settings, host.inventory, Host.read())
        places = settings.places
    except ConfigError as exc:
        _fail(str(exc), 2)
    request = LoadRequest(
        model,
        quant=quant,
        tensor_parallel=tensor_parallel,
        devices=indices,
        max_context_tokens=max_context_tokens,
    )
    rooms = checking.rooms_of(specs, host.inventory, host.probe)
    answer = checking.check(request, places, rooms)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(answer)).decode())
    else:
        checking.show(Console(), answer)
    raise typer.Exit(0 if answer.loadable else 1)


def _indices(devices: str | None) -> list[int] | None:
    """Return the indices that ``0,1`` names, None for names of devices."""
    parts = [part.strip() for part in (devices or "").split(",")]
    return [int(part) for part in parts] if all(map(str.isdecimal, parts)) else None


@app.command()
def tap(
    topics: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TOPIC]...", help="Beginnings of topics; none means all."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(help="Where the neuron binds its taps; else by its configuration."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the neuron listens.")
    ] = None,
    config: Config = None,
) -> None:
    """Print what happens inside a running neuron, live, one line each, until Ctrl-C.

    \b
      neuron tap                    everything
      neuron tap command event      what supervisor and device processes tell each other
      neuron tap request            every request as it ends
      neuron tap step               every step of a device
      neuron tap --listen 127.0.0.1:8000 event.failed

    \b
    Topics are request, step, command.NAME and event.NAME; a beginning stands for all that have it.
    An unknown one is answered with the list.
    """  # noqa: D301 - as above
    _refuse_unknown(topics or [])
    try:
        if directory is None:
            settings = load_config(config, listen=listen)
            directory = settings.tap_directory(settings.address[1])
        for topic, message in taps.listen(directory, topics or []):
            typer.echo(f"{topic} {msgspec.json.encode(message).decode()}")
    except ConfigError as exc:
        _fail(str(exc), 2)
    except BrokenPipeError:  # piped into head: enough was read
        sys.stderr.close()
    except OSError as exc:
        _fail(
            f"{exc}: is the neuron running, with [taps] enabled? One that listens elsewhere is "
            f"named by --listen HOST:PORT, or NEURON_LISTEN",
            1,
        )
    except KeyboardInterrupt:
        typer.echo()


def _refuse_unknown(topics: list[str]) -> None:
    for topic in topics:
        if not any(known.startswith(topic) for known in taps.TOPICS):
            _fail(f"there is no topic {topic!r}; there are {', '.join(taps.TOPICS)}", 2)


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(f"neuron: {sentence}", err=True)
    raise typer.Exit(code)


def run() -> None:
    """Run the command line of this process."""
    app()
