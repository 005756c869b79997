"""Structured logging, configured once per process: JSON lines, or colours on a terminal.

The event is a constant lowercase phrase; everything variable is a field. ``role``, ``pid`` and
whatever the process binds (``device``) are in every line, the request's id in every line of it.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import orjson
import structlog


def _json(value: Any, **_: Any) -> bytes:
    return orjson.dumps(value, default=str)


def configure_logging(role: str, level: str = "info", **bound: Any) -> None:
    """Send this process's log to stderr, one write per line; *bound* goes into every line."""
    on_terminal = sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    if on_terminal:
        renderer: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer()]
        factory: Any = structlog.WriteLoggerFactory(file=sys.stderr)
    else:
        renderer = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_json),
        ]
        factory = structlog.BytesLoggerFactory(file=sys.stderr.buffer)
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role, pid=os.getpid(), **bound)
