"""The web application of a neuron, put together: services, middlewares, routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from aiohttp import web

from cortex.ipc.http_server import HttpRunner
from cortex.ipc.openapi import document
from cortex.ipc.taps import Tap
from cortex.runtime.access import Access, admitting
from cortex.runtime.activation import Activation
from cortex.runtime.cached_models import CachedModels
from cortex.runtime.config import NeuronConfig
from cortex.runtime.discovery import Inventory
from cortex.runtime.door import Door
from cortex.runtime.embeddings import Embeddings
from cortex.runtime.grammar_check import GrammarCheck
from cortex.runtime.health import Report
from cortex.runtime.inference import Inference, Timing
from cortex.runtime.metrics import Metrics
from cortex.runtime.middlewares import (
    echo_request_id,
    errors_as_json,
    refuse,
    with_request_id,
)
from cortex.runtime.node import Node
from cortex.runtime.prompts import TextThreads
from cortex.runtime.readings import Readings
from cortex.runtime.route_table import NEURON
from cortex.runtime.routes import DOCUMENT, SERVICES, Services
from cortex.runtime.traffic import Traffics
from cortex.runtime.version import Build


def build_services(
    config: NeuronConfig,
    node: Node,
    *,
    access: Access,
    inventory: Inventory,
    readings: Readings,
    activation: Activation,
    tap: Tap,
    build: Build,
    timing: Timing | None = None,
) -> Services:
    """Return what the handlers call, wired up for *node*; needs a running event loop."""
    traffics = Traffics(config.admission)
    report = Report(
        node,
        inventory=inventory,
        readings=readings,
        activation=activation,
        traffics=traffics,
    )
    metrics = Metrics(report.health)
    timing = timing or Timing()
    threads = TextThreads()
    grammars = GrammarCheck()
    door = Door(
        traffics,
        metrics,
        tap,
        clock=timing.clock,
        body_patience_seconds=timing.body_patience_seconds,
    )
    return Services(
        node=node,
        timing=timing,
        access=access,
        report=report,
        door=door,
        threads=threads,
        grammars=grammars,
        inference=Inference(node, traffics, door, threads, grammars=grammars, timing=timing),
        embeddings=Embeddings(node, traffics, door, threads),
        cached=CachedModels(config.places),
        metrics=metrics,
        build=build,
        started=int(time.time()),
    )


def build_app(services: Services) -> web.Application:
    """Return the application; it needs the server of ``build_runner``."""
    app = web.Application(middlewares=[with_request_id, errors_as_json, admitting(services.access)])
    app[SERVICES] = services
    app[DOCUMENT] = document(NEURON, services.build.package_version)
    app.add_routes([route.definition() for route in NEURON.routes])
    app.on_response_prepare.append(echo_request_id)
    app.cleanup_ctx.append(_text_threads)
    app.cleanup_ctx.append(_grammar_check)
    return app


def build_runner(app: web.Application, shutdown_timeout: float) -> HttpRunner:
    """Return what serves *app*: it cancels the handlers of clients that leave.

    That is how their generations end, in prefill too and without a stream.
    """
    return HttpRunner(app, refuse, shutdown_timeout=shutdown_timeout)


async def _text_threads(app: web.Application) -> AsyncIterator[None]:
    yield
    app[SERVICES].threads.close()


async def _grammar_check(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[SERVICES].grammars.close()
