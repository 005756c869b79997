"""What one request needs to remember while it is served, and how it ends when it fails."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from cortex.gateway.affinity import Session
from cortex.gateway.attempts import Attempts
from cortex.gateway.auth import Principal
from cortex.gateway.catalogue import Target
from cortex.gateway.client_stream import ClientGone, ClientStream
from cortex.gateway.dialects.dialect import Call
from cortex.gateway.errors import error_response
from cortex.gateway.routing import Serve
from cortex.gateway.usage import RequestRecord
from cortex.ipc.errors import ApiError
from cortex.ipc.node_api import HEADER_KEY, HEADER_PRIORITY, HEADER_REQUEST_ID, HEADER_USAGE


@dataclass
class Exchange:
    """What one request needs to remember while it is served."""

    call: Call
    target: Target
    principal: Principal
    session: Session | None
    request_id: str
    client: ClientStream
    record: RequestRecord
    attempts: Attempts
    replica: Serve | None = None
    """The one that is asked, or whose error the client gets."""
    has_answer: bool = False
    """Whether a byte of a node's answer has gone to the client; then there is no second try."""

    def headers(self) -> dict[str, str]:
        """Return the headers for a node."""
        headers = {HEADER_REQUEST_ID: self.request_id, HEADER_USAGE: "1"}
        if self.principal.key_id:
            headers[HEADER_KEY] = self.principal.key_id
        if self.principal.priority:
            headers[HEADER_PRIORITY] = str(self.principal.priority)
        return headers

    async def end_with(self, error: ApiError) -> web.StreamResponse:
        """Answer with *error*, or end the stream with its frame where the status is spent."""
        error = self.call.refusal(error)
        if self.client.response is None:
            answer = error_response(self.call.dialect, error, self.request_id)
            if self.replica:
                answer.headers.update(self.replica.headers())
            return answer
        try:
            await self.client.write(self.call.error_frame(error, self.request_id))
            return await self.client.finish()
        except ClientGone:
            return self.client.response
