"""`steering` in the wrong place of a request's body, on the routes that parse it themselves."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from server.state import steering_state
from steering.request.misplaced import refuse_misplaced


async def refuse_misplaced_in(request: Request) -> None:
    """Raises SteeringError if the body has `steering` where no route reads it.

    Starlette keeps the parsed body for the route. A body that cannot be parsed, or never came, is
    left to the route to refuse.
    """
    try:
        body = await request.json()
    except (ValueError, RecursionError, ClientDisconnect):
        return
    refuse_misplaced(body, any_sae=bool(steering_state(request).catalog.names))
