"""Access control of the browser tool: each browser can read only its own images, maps and event streams.

Gradio sends a file to anyone who knows its path, follows URLs that a request contains, and has many routes that this
tool never calls. This middleware runs before the mounted application and passes only the routes that the page uses. It
identifies a browser by a cookie and records the files and event streams that the application made for it. A request
for another file, for a URL or for another browser's stream gets the answer 404.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from ..core.errors import InputError
from ..core.images import MAX_PIXELS
from ..core.video_file import check_media
from .budgets import Rate
from .connections import client_address
from .errors import ServiceError
from .middleware import App, Message, Receive, Send

COOKIE = "mllm_fast_ui"
_GIVEN = re.compile(rb"(?:^|;)\s*" + COOKIE.encode() + rb"=([0-9a-f]{64})\s*(?:;|$)")
_MOST_SESSIONS = 4096
_LOGINS, _LOGINS_A_SECOND = 10, 0.2  # tries to log in that an address has at once, and that come back
_MOST_STREAMS = 256  # per session; the least recently used one is forgotten first
_FILE = "/gradio_api/file="
_OPEN = re.compile(
    r"/|/(config|user|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login_check|login|logout)/?"
    r"|/pwa_icon(/\d+)?|/(assets|static|svelte)/.*|/gradio_api/(user|login_check|app_id|token|info|startup-events)/?"
)
_STREAMS = re.compile(r"/gradio_api/(heartbeat/(?P<name>\w+)|(queue/data|upload_progress|queue/join|upload|cancel)/?)")
_NAMES = ("session_hash", "upload_id")  # keys of stream names, in a query or a body
_UPLOADED, _EVENTS = "/gradio_api/upload", "/gradio_api/queue/data"
# what a browser needs before its user has logged in
_BEFORE_LOGIN = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login_check|login|logout)/?"
    r"|/pwa_icon(/\d+)?|/(assets|static|svelte)/.*|/gradio_api/login_check/?"
)
_EVENT_BYTES = 1 << 20  # the largest body that starts or cancels an event; images are uploaded before


@dataclass
class _Session:
    """What one browser may read.

    Attributes:
        files: The paths of its files.
        streams: The names of its streams, the least recently used one first.
        used: The time of its last request, by `time.monotonic`.
    """

    files: set[str] = field(default_factory=set)
    streams: OrderedDict[str, None] = field(default_factory=OrderedDict)
    used: float = field(default_factory=time.monotonic)


class UISessionMiddleware:
    """ASGI middleware that guards the mounted Gradio application.

    Args:
        app: The Gradio application.
        seconds: How long a session is remembered after its last request. It must not be shorter than Gradio keeps the
            files.
        max_pixels: The largest image that is accepted, in pixels.
        logged_in: Returns whether the user of a request, given its cookies, has logged in.
    """

    def __init__(
        self,
        app: App,
        seconds: float,
        max_pixels: int = MAX_PIXELS,
        logged_in: Callable[[Mapping[str, str]], bool] = lambda _: True,
    ):
        self._app, self._seconds, self._max_pixels, self._logged_in = app, seconds, max_pixels, logged_in
        self._logins = Rate(_LOGINS_A_SECOND, _LOGINS)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._owners: dict[str, str] = {}  # from the name of a stream to its session

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        self._forget()
        if path.rstrip("/") == "/login" and scope["method"] == "POST":
            self._logins.count(client_address(scope.get("client")))
        elif not _BEFORE_LOGIN.fullmatch(path) and not self._logged_in(_cookies(scope)):
            raise ServiceError(401, "log in first", code="not_logged_in")
        identity, is_new = _identity(scope)
        if is_new:
            send = _with_cookie(send, identity, scope.get("scheme") == "https")
        if _OPEN.fullmatch(path):
            await self._app(scope, receive, send)
        elif path.startswith(_FILE):
            await self._file(path.removeprefix(_FILE), identity, scope, receive, send)
        elif found := _STREAMS.fullmatch(path):
            await self._stream(path.rstrip("/"), found["name"], identity, scope, receive, send)
        else:
            await _not_found(send)

    async def _file(self, path: str, identity: str, scope: Any, receive: Receive, send: Send) -> None:
        session = self._sessions.get(identity)
        if session is None or path not in session.files or scope["method"] not in ("GET", "HEAD"):
            await _not_found(send)
            return
        await self._app(scope, receive, send)

    async def _stream(
        self, path: str, name: str | None, identity: str, scope: Any, receive: Receive, send: Send
    ) -> None:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        names = [one for key in _NAMES for one in query.get(key, [])] + ([name] if name else [])
        if path in ("/gradio_api/queue/join", "/gradio_api/cancel"):
            body = await _json(receive)
            if not isinstance(body, dict) or not all(isinstance(body.get(key, ""), str) for key in _NAMES):
                await _not_found(send)
                return
            names += [body[key] for key in _NAMES if key in body]
            session = self._sessions.get(identity)
            files = set(_named_files(body))
            if not files <= (session.files if session else set()):
                await _not_found(send, "this file was not uploaded here, or was forgotten: upload the image again")
                return
            try:
                for one in files:  # before Gradio opens it
                    await asyncio.to_thread(check_media, one, self._max_pixels)
            except InputError as error:
                await _refused(send, 400, str(error))
                return
            # the application reads exactly the body that was checked
            scope, receive = _replaced(scope, receive, json.dumps(body).encode())
        if not self._owns(identity, names):
            await _not_found(send)
            return
        if path in (_UPLOADED, _EVENTS):
            scope = scope | {"headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
            send = self._noting(send, identity, path)
        await self._app(scope, receive, send)

    def _owns(self, identity: str, names: list[str]) -> bool:
        """Return whether the browser owns all these streams. Streams without an owner become its own."""
        if any(self._owners.get(name, identity) != identity for name in names):
            return False
        streams = self._session(identity).streams
        for name in names:
            self._owners[name] = identity
            streams[name] = None
            streams.move_to_end(name)
        while len(streams) > _MOST_STREAMS:
            del self._owners[streams.popitem(last=False)[0]]
        return True

    def _noting(self, send: Send, identity: str, path: str) -> Send:
        """Wrap `send` to record the files that an answer names: the paths of an upload, or the paths in events."""
        rest = b""

        async def noting(message: Message) -> None:
            nonlocal rest
            if message["type"] == "http.response.body":
                rest += message.get("body", b"")
                if path == _EVENTS:
                    *lines, rest = rest.split(b"\n")
                    found = [
                        one for line in lines if line.startswith(b"data:") for one in _made_files(_parsed(line[5:]))
                    ]
                else:
                    whole = None if message.get("more_body") else _parsed(rest)
                    found = [one for one in whole if isinstance(one, str)] if isinstance(whole, list) else []
                if found:
                    self._session(identity).files.update(found)
            await send(message)

        return noting

    def _session(self, identity: str) -> _Session:
        session = self._sessions.setdefault(identity, _Session())
        session.used = time.monotonic()
        self._sessions.move_to_end(identity)
        return session

    def _forget(self) -> None:
        """Forget expired sessions, and the least recently used ones if there are too many."""
        before = time.monotonic() - self._seconds
        while self._sessions:
            identity, session = next(iter(self._sessions.items()))
            if session.used >= before and len(self._sessions) <= _MOST_SESSIONS:
                break
            del self._sessions[identity]
            for name in session.streams:
                del self._owners[name]


def _identity(scope: Any) -> tuple[str, bool]:
    """Return the session id from the browser's cookie, or a new one, and whether it is new."""
    for name, value in scope["headers"]:
        if name == b"cookie" and (found := _GIVEN.search(value)):
            return found[1].decode(), False
    return secrets.token_hex(32), True


def _with_cookie(send: Send, identity: str, secure: bool) -> Send:
    text = f"{COOKIE}={identity}; Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if secure else "")

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"set-cookie", text.encode())]
        await send(message)

    return sending


def _named_files(content: Any) -> Iterator[str]:
    """Yield every value of a key "path" in some JSON, such as the paths of Gradio's file objects."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "path" and isinstance(value, str):
                yield value
            else:
                yield from _named_files(value)
    elif isinstance(content, list):
        for value in content:
            yield from _named_files(value)


def _made_files(content: Any) -> Iterator[str]:
    """Yield the files that an event of the application names, also as a change of the path in an earlier event."""
    yield from _named_files(content)
    yield from _changed_files(content)


def _changed_files(content: Any) -> Iterator[str]:
    if isinstance(content, list) and len(content) == 3 and content[0] in ("replace", "add"):
        _, where, value = content
        if isinstance(where, list) and where[-1:] == ["path"] and isinstance(value, str):
            yield value
    for one in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _changed_files(one)


async def _json(receive: Receive) -> Any:
    """Read and parse the body of a request; return None if it is not JSON."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > _EVENT_BYTES:
            return None
        if not message.get("more_body"):
            return _parsed(b"".join(parts))


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _replaced(scope: Any, receive: Receive, body: bytes) -> tuple[Any, Receive]:
    """Return the request with another body."""
    headers = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
    sent = False

    async def receiving() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return scope | {"headers": [*headers, (b"content-length", str(len(body)).encode())]}, receiving


def _cookies(scope: Any) -> dict[str, str]:
    found: SimpleCookie = SimpleCookie()
    for name, value in scope["headers"]:
        if name == b"cookie":
            with suppress(CookieError):
                found.load(value.decode("latin-1"))
    return {name: one.value for name, one in found.items()}


async def _not_found(send: Send, words: str = "there is nothing here") -> None:
    await _refused(send, 404, words)


async def _refused(send: Send, status: int, words: str) -> None:
    body = json.dumps({"detail": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
