"""``GET /fleet/usage``: what has been used, by key, model and day.

Where keys are required, a key sees what it has used itself, an operator's what everybody has.
"""

from __future__ import annotations

from datetime import date

from aiohttp import web

from cortex.gateway.auth import principal_of
from cortex.gateway.services import SERVICES, as_json
from cortex.ipc.errors import InvalidRequest, OperatorOnly
from cortex.ipc.fleet_api import UsageView


async def usage(request: web.Request) -> web.Response:
    """Requests and tokens: of one key or model if it is named, from a day on if one is."""
    services = request.app[SERVICES]
    model = request.query.get("model")
    rows = await services.ledger.rows(
        key=_key_to_show(request, request.query.get("key")),
        model=services.written.catalogue.target(model).id if model else None,
        since=_day(request.query.get("since")),
    )
    return as_json(UsageView(rows))


def _key_to_show(request: web.Request, asked: str | None) -> str | None:
    """Return whose rows may be shown of those *asked* for; raise OperatorOnly."""
    principal = principal_of(request)
    entitlements = request.app[SERVICES].written.config.entitlements
    if principal.is_operator or not entitlements.require_auth:
        return asked
    if asked not in (None, principal.key_id):
        raise OperatorOnly(
            f"the key {principal.key_id!r} may see its own usage only: more takes a key with "
            "operator = true",
            param="key",
        )
    return principal.key_id


def _day(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as exc:
        raise InvalidRequest("since must be a day, as YYYY-MM-DD", param="since") from exc
