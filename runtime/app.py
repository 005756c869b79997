"""The web application of a neuron, put together: services, middlewares, routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from aiohttp import web

from cortex.ipc.node_api import MAX_BODY_BYTES
from cortex.ipc.taps import Tap
from cortex.runtime.activation import Activation
from cortex.runtime.cached_models import CachedModels
from cortex.runtime.config import NeuronConfig
from cortex.runtime.discovery import Inventory
from cortex.runtime.health import Report
from cortex.runtime.inference import Inference, Timing
from cortex.runtime.metrics import Metrics
from cortex.runtime.middlewares import echo_request_id, errors_as_json, with_request_id
from cortex.runtime.node import Node
from cortex.runtime.readings import Readings
from cortex.runtime.routes import ROUTES, SERVICES, Services
from cortex.runtime.traffic import Traffics
from cortex.runtime.version import Build


def build_services(
    config: NeuronConfig,
    node: Node,
    *,
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
    return Services(
        node=node,
        report=report,
        inference=Inference(node, traffics, metrics, tap=tap, timing=timing or Timing()),
        cached=CachedModels(config.cache_directory, None if config.is_loopback else ()),
        metrics=metrics,
        build=build,
        started=int(time.time()),
    )


def build_app(services: Services) -> web.Application:
    """Return the application; serve it with ``handler_cancellation=True``.

    That is how a client that leaves ends its generation, in prefill too and without a stream.
    """
    app = web.Application(
        middlewares=[with_request_id, errors_as_json], client_max_size=MAX_BODY_BYTES
    )
    app[SERVICES] = services
    app.add_routes(ROUTES)
    app.on_response_prepare.append(echo_request_id)
    app.cleanup_ctx.append(_text_threads)
    return app


async def _text_threads(app: web.Application) -> AsyncIterator[None]:
    yield
    app[SERVICES].inference.close()
