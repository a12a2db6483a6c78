"""Says at once that there is no room, before anything else looks at a request.

A full server has the least time, and then most are refused: neither the route nor the body is looked at.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.serving.http.desk import Desk
from minigpt4.serving.http.openai_errors import ApiError, error_response

COMPLETIONS = "/v1/chat/completions"


class Doorman:
    """ASGI middleware.

    Args:
        app: What is behind it.
        desk: Knows whether there is room.
    """

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self.app = app
        self.desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != COMPLETIONS:
            await self.app(scope, receive, send)
            return
        try:
            place = scope["place"] = self.desk.take_place()
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.desk.give_back(place)
