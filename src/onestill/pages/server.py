"""The server of a student's page: the page, its own files, the one thing that can be asked for, and nothing else.

What gradio serves besides, such as files, uploads, proxies and its own calls of functions, is not reached from here.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import gc
import ipaddress
import json
import logging
import re
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from onestill.core.errors import RunError, SettingError, SettingErrors
from onestill.core.reading import parse_json
from onestill.core.settings import refuse_unknown
from onestill.pages.config import Asked
from onestill.pages.player import Drawn, Played, draw, messages

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

DRAW = "/draw"
"""Where pictures are asked for: a POST of the fields of `Asked` as JSON."""
MOST_BODY = 2**18
"""Bytes of a request: the longest prompt has fewer, however it is escaped."""
_FILES = ("/", "/theme.css", "/favicon.ico")
_FOLDERS = re.compile(r"/(assets|static)/(?:(?!\.)[\w.@+-]+/)*(?!\.)[\w.@+-]+", re.ASCII)
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; frame-ancestors 'none'; "
        "base-uri 'self'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
"""Of every answer: whatever the page's scripts may hold, a browser asks nobody else for anything."""
_OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


class _Refused(Exception):
    """A request cannot be answered: the status, and why in words."""

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(why)


class Door:
    """What stands between the network and the page, as an ASGI application.

    Args:
        page: The page's application.
        played: What draws.
        queue_size: Requests that may wait while one is drawn.
        hosts: The names by which it may be called; any if None. Another's page cannot call it under a name of its own.
    """

    def __init__(self, page: ASGIApp, played: Played, queue_size: int, hosts: frozenset[str] | None) -> None:
        self.page, self.played, self.queue_size, self.hosts = page, played, queue_size, hosts
        # One thread for all: networks are not called by two at once, and it has the threads of the one that has made it.
        self.thread = ThreadPoolExecutor(1, "drawing", torch.set_num_threads, (torch.get_num_threads(),))
        self.turn, self.present = asyncio.Lock(), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on to the page."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.page(scope, receive, send)
            return
        path, is_read = scope["path"], scope["method"] in ("GET", "HEAD")
        if self.hosts is not None and _host_of(scope) not in self.hosts:
            await _say(403, "this page is called by the address that it was started at", send)
        elif path == DRAW and scope["method"] == "POST":
            await self._answer(scope, receive, send)
        elif is_read and (path in _FILES or _FOLDERS.fullmatch(path)):
            asked = {**scope, "query_string": b""}  # by which gradio opens other pages, and files of its own
            await self.page(asked, receive, _with_headers(send))
        else:
            await _say(404, "there is nothing here", send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import ClientDisconnect, Request

        request = Request(scope, receive)
        try:
            asked = _asked(await _body(request))
            drawn = await self._in_turn(request, asked)
        except ClientDisconnect:
            return  # in the midst of the request
        except _Refused as error:
            await _say(error.status, error.why, send)
        except (SettingError, SettingErrors) as error:
            await _say(400, messages(error), send)
        except RunError as error:  # such as too little memory
            await _say(503, str(error), send)
        except Exception:
            logging.getLogger(__name__).exception("a picture could not be drawn")
            await _say(500, "this could not be drawn; the terminal of the server says why", send)
        else:
            await _send(200, _as_json(drawn), send)

    async def _in_turn(self, request: Request, asked: Asked) -> Drawn:
        """Draw when those that came before are drawn; refuse if too many wait."""
        if self.present > self.queue_size:
            raise _Refused(503, f"{self.queue_size} requests wait already; try again in a moment")
        self.present += 1
        try:
            async with self.turn:
                if await request.is_disconnected():
                    raise _Refused(499, "nobody waits for this any more")
                return await asyncio.get_running_loop().run_in_executor(self.thread, draw, self.played, asked)
        finally:
            self.present -= 1


async def _body(request: Request) -> str:
    """Return the text of a request; a page of another origin could not send JSON unasked, so nothing else is taken."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "a request is JSON, with the content type application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise _Refused(413, f"a request has at most {MOST_BODY:,} bytes")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(400, "the request is no UTF-8 text") from None


def _asked(text: str) -> Asked:
    """Return what a text asks for; SettingError or `_Refused` if that is nothing that can be drawn."""
    try:
        found = parse_json(text, "the request")
    except ValueError as error:
        raise _Refused(400, str(error)) from None
    if not isinstance(found, dict):
        raise _Refused(400, "the request is no JSON object")
    refuse_unknown(found, Asked.model_fields, "the request")
    return Asked(**found)


def _as_json(drawn: Drawn) -> dict[str, Any]:
    pictures = [{"png": base64.b64encode(each.png).decode(), "seed": each.seed} for each in drawn.pictures]
    said = {"milliseconds": drawn.milliseconds, "num_steps": drawn.num_steps, "warnings": drawn.warnings}
    return {"pictures": pictures, **said}


async def _say(status: int, why: str, send: Send) -> None:
    await _send(status, {"error": why}, send)


async def _send(status: int, content: dict[str, Any], send: Send) -> None:
    """Answer with JSON; as a picture is drawn in milliseconds, by nothing that takes its time."""
    body = json.dumps(content).encode()
    headers = {**HEADERS, "content-type": "application/json", "cache-control": "no-store"}
    headers["content-length"] = str(len(body))
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Callable[[MutableMapping[str, Any]], Awaitable[None]]:
    """Return a `send` that adds `HEADERS`."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode("latin-1")) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await send(message)

    return sending


def _host_of(scope: Scope) -> str:
    """Return the name that a request calls the server by, without the port."""
    named = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    return re.sub(r":\d*$", "", named)


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; SettingError if the address is none of this machine's, or the port is taken."""
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise SettingError("host", host, "is no address", "give one of this machine, such as 127.0.0.1") from None
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        found.listen(128)
    except OSError as error:
        found.close()
        raise _not_listening(host, port, error) from None
    return found


def _not_listening(host: str, port: int, error: OSError) -> SettingError:
    if error.errno == errno.EADDRINUSE:
        return SettingError("port", port, "is taken by another program", "give another, or 0 for a free one")
    if error.errno in (errno.EACCES, errno.EPERM):
        return SettingError("port", port, "may not be opened by you", "give one from 1024 up, or 0 for a free one")
    if error.errno == errno.EADDRNOTAVAIL:
        return SettingError("host", host, "is no address of this machine", "give 127.0.0.1 for this machine alone")
    return SettingError("host", host, f"cannot be listened at: {(error.strerror or str(error)).lower()}")


def is_own(place: socket.socket) -> bool:
    """Return whether a socket is reached from this machine alone."""
    return ipaddress.ip_address(place.getsockname()[0].partition("%")[0]).is_loopback


def address_of(place: socket.socket) -> str:
    """Return the address that a browser opens."""
    host, port = place.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "localhost"  # it listens at every address, of which this is one
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(frozen=True)
class Server:
    """A page that is served at `address` while `run` runs, until Ctrl-C, or `stop` from another thread."""

    address: str
    uvicorn: Any
    socket: socket.socket
    door: Door

    def run(self) -> None:
        """Serve until it is stopped; Ctrl-C is a KeyboardInterrupt, when the picture at hand is drawn."""
        gc.freeze()  # a collection then looks at what requests have made, not at all of torch and of the page
        try:
            self._listen()
        finally:
            gc.unfreeze()
            self.socket.close()
            self.door.thread.shutdown(cancel_futures=True)

    def _listen(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self.uvicorn.run(sockets=[self.socket])
        # In a notebook this thread runs a loop already, which cannot have another inside.
        thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],))
        thread.start()
        try:
            thread.join()
        finally:  # after an interrupt too
            self.stop()
            thread.join()

    def stop(self) -> None:
        """End `run`, which another thread is in."""
        self.uvicorn.should_exit = True


def serve_page(page: ASGIApp, played: Played, place: socket.socket, *, host: str, queue_size: int) -> Server:
    """Return the server of a page at a socket that listens already."""
    import uvicorn

    hosts = frozenset({*_OWN_NAMES, host.lower()}) if is_own(place) else None
    door = Door(page, played, queue_size, hosts)
    config = uvicorn.Config(
        door, log_level="warning", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=2
    )
    return Server(address_of(place), uvicorn.Server(config), place, door)
