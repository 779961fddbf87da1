"""A Ray Serve application with the same HTTP interface, for many machines.

    serve run mllm_fast.serving.ray_app:app model=llava-hf/llava-1.5-7b-hf gpus=1 max_replicas=8 store=s3://bucket/contexts

Ingresses serve HTTP, and replicas run the model. All requests about one image go to the same replica, which has its
context in memory; consistent hashing of the image's pixels selects the replica. When replicas are added or removed,
only a few images move, and their contexts are read from the shared store. If a replica dies, its requests are sent
again to another one.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from ..context.store import pictures_digest
from ..core.images import load_image
from ..core.threads import spin_settings
from ..core.video import Video
from .app import create_app
from .auth import ApiKeys
from .budgets import Lane
from .errors import ServiceError, service_error
from .follower import end_with, start_followers
from .image_fetch import choice_of, picture_files, video_address
from .logs import Log
from .messages import conversation
from .metrics import Metrics
from .preparation import check_pixels, in_pool
from .ray_options import Options
from .responses import CONTEXT_ID, ResponseChunk
from .routes.state import Probes
from .schema import ChatRequest, ContextInfo, ContextRequest, ExplanationRequest, ImageURL, Message
from .service import Service, check_divided
from .settings import Settings

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
_TRIES = 5
_MEMO = 4096  # images whose digests are remembered
_DIGITS = 24  # how many first digits of the id all contexts of the same images of a tenant share


def app(options: Options | dict[str, Any]) -> serve.Application:
    """Create the application, for `serve run` or `serve.run`.

    Args:
        options: The arguments. `serve run` passes them as a dictionary of texts.
    """
    options = options if isinstance(options, Options) else Options(**options)
    settings = options.settings
    if options.tp > 1:
        check_divided(settings)
    replicas = Replica.options(  # type: ignore[attr-defined]
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": max(options.min_replicas, options.max_replicas),
            "target_ongoing_requests": options.target,
        },
        max_ongoing_requests=settings.max_batch + settings.max_queue,
        ray_actor_options={
            "num_gpus": options.gpus,
            "num_cpus": options.cpus,
            "runtime_env": {"env_vars": spin_settings(os.environ)},
        },
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),  # type: ignore[arg-type]
    ).bind(options.model_dump())
    ingress = Ingress.options(num_replicas=options.ingresses, max_ongoing_requests=4096)  # type: ignore[attr-defined]
    return ingress.bind(replicas, options.model_dump())


@serve.deployment(health_check_period_s=5, graceful_shutdown_timeout_s=60)
class Replica:
    """A replica: a model and its service.

    Its methods return errors instead of raising them, so that Ray does not wrap them.

    Args:
        options: The fields of `Options`.
    """

    def __init__(self, options: dict[str, Any]):
        given = Options(**options)
        followers = start_followers(given.tp, options) if given.tp > 1 else []
        self._service = Service(given.load(), given.settings, given.name or given.model)
        self._started = False
        if followers:  # without one of them no request can be answered here
            end_with(followers)
            self._service.engine.on_failure = lambda _: os._exit(1)

    async def chat(
        self, request: dict[str, Any], tenant: str, client: str
    ) -> AsyncIterator[ResponseChunk | ServiceError]:
        """Yield the chunks of an answer, or a `ServiceError` as the last one."""
        await self._start()
        try:
            pieces = await self._service.chat(ChatRequest.model_validate(request), tenant, client)
            async with aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    yield piece
        except Exception as error:
            yield service_error(error)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call another method of the service, and return its result or a `ServiceError`."""
        await self._start()
        try:
            return await getattr(self._service, method)(*arguments)
        except Exception as error:
            return service_error(error)

    async def check_health(self) -> None:
        """Check that the engine runs.

        Raises:
            RuntimeError: The engine has stopped. Ray Serve then replaces the replica.
        """
        if self._started and not self._service.engine.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        service = getattr(self, "_service", None)
        if service is not None:
            service.stop()

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            await self._service.start()


class Remote:
    """A `backend.Backend` that forwards the requests to the replicas.

    Args:
        handle: The handle of the replicas.
        name: The name by which requests call the model.
        settings: The limits and defaults of the service.
    """

    def __init__(self, handle: DeploymentHandle, name: str, settings: Settings):
        self.name, self.settings = name, settings
        self._handle = handle
        self._memo: OrderedDict[tuple[str, bytes], str] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "digest")
        self._images = Lane("requests with new images", 8, settings.max_queue, settings.max_client_requests)

    async def chat(self, request: ChatRequest, tenant: str, client: str) -> AsyncIterator[ResponseChunk]:
        """Answer a chat request, see `Service.chat`.

        If the replica dies, the request is sent again to another one. A request without a seed is given one, so that an
        answer that is sampled comes out the same again.
        """
        urls = conversation(request.messages, self.settings).urls
        if request.context is not None:
            session = request.context[4 : 4 + _DIGITS]
        else:
            session, urls = await self._session(urls, tenant, client)
        content = request.model_dump(exclude_none=True, by_alias=True) | {
            "messages": _with_urls(request.messages, urls)
        }
        content.setdefault("seed", secrets.randbits(63))
        pieces = self._pieces(content, (tenant, client), session)
        first = await anext(pieces)  # an error is raised before the stream begins
        return _behind(first, pieces)

    async def create(self, request: ContextRequest, tenant: str, client: str) -> ContextInfo:
        """See `Service.create`."""
        given = (*(one.url for one in request.images), *map(video_address, request.videos))
        session, urls = await self._session(given, tenant, client)
        count = len(request.images)
        videos = [one.model_copy(update={"url": url}) for one, url in zip(request.videos, urls[count:], strict=True)]
        changed = request.model_copy(update={"images": [ImageURL(url=url) for url in urls[:count]], "videos": videos})
        return await self._call(session, "create", changed, tenant, client)

    async def context(self, identity: str, tenant: str, kept: bool, client: str) -> ContextInfo:
        """See `Service.context`."""
        return await self._call(_of_id(identity), "context", identity, tenant, kept, client)

    async def contexts(self, tenant: str, client: str) -> list[str]:
        """Return the ids of a tenant's contexts in the shared store and in one replica's memory."""
        return await self._call("", "contexts", tenant, client)

    async def delete(self, identity: str, tenant: str, client: str) -> None:
        """See `Service.delete`."""
        await self._call(_of_id(identity), "delete", identity, tenant, client)

    async def explain(self, request: ExplanationRequest, tenant: str, client: str) -> bytes:
        """See `Service.explain`."""
        return await self._call("", "explain", request, tenant, client)

    async def _session(self, urls: tuple[str, ...], tenant: str, client: str) -> tuple[str, tuple[str, ...]]:
        """Return the session id of all requests about these images, and the URLs with remote images as data URLs."""
        if not urls:
            return "", ()
        named = "\n".join(choice_of(url) + url for url in urls)
        key = tenant, hashlib.sha256(named.encode("utf-8", "surrogatepass")).digest()
        local = all(url[:5].lower() == "data:" for url in urls)
        if local and key in self._memo:
            self._memo.move_to_end(key)
            return self._memo[key], urls
        async with self._images.place(client or tenant, self.settings.time_limit):
            files = await picture_files(urls, self.settings)
            digest = await in_pool(self._pool, lambda: self._digest(files, tenant))
        if local:
            self._memo[key] = digest
            while len(self._memo) > _MEMO:
                self._memo.popitem(last=False)
            return digest, urls
        return digest, tuple(map(_data_url, files))

    def _digest(self, files: list[bytes | Video], tenant: str) -> str:
        check_pixels(files, self.settings)
        read = [one if isinstance(one, Video) else load_image(one, self.settings.max_pixels) for one in files]
        return pictures_digest(read, tenant)[:_DIGITS]

    async def _call(self, session: str, method: str, *arguments: Any) -> Any:
        for again in range(_TRIES):
            try:
                handle = self._handle.options(method_name="call", **_sticky(session))
                found = await handle.remote(method, *arguments)
            except _LOST:
                if again == _TRIES - 1:
                    raise _no_replica() from None
                continue
            if isinstance(found, ServiceError):
                raise found
            return found
        raise _no_replica()

    async def _pieces(
        self, content: dict[str, Any], whose: tuple[str, str], session: str
    ) -> AsyncIterator[ResponseChunk]:
        sent = logs = 0  # characters and log-probabilities
        for again in range(_TRIES):
            skip, skip_logs = sent, logs
            stream = self._handle.options(method_name="chat", stream=True, **_sticky(session)).remote(content, *whose)
            try:
                async for piece in stream:  # type: ignore[union-attr]
                    if isinstance(piece, ServiceError):
                        raise piece
                    text, skip = piece.text[skip:], max(0, skip - len(piece.text))
                    entries, skip_logs = piece.logprobs[skip_logs:], max(0, skip_logs - len(piece.logprobs))
                    sent, logs = sent + len(text), logs + len(entries)
                    if text or entries or piece.finish is not None:
                        yield ResponseChunk(text, entries, piece.finish, piece.usage, piece.context)
                return
            except _LOST:
                if again == _TRIES - 1:
                    raise _no_replica() from None
            finally:
                stream.cancel()


@serve.deployment
@serve.ingress()
class Ingress:
    """An ingress: it serves HTTP and forwards the requests to the replicas.

    Args:
        handle: The handle of the replicas.
        options: The fields of `Options`.
    """

    def __init__(self, handle: DeploymentHandle, options: dict[str, Any]):
        given = Options(**options)
        self._remote = Remote(handle, given.name or given.model, given.settings)
        self._keys = ApiKeys.find(given.api_keys)
        self._log = Log() if given.log else Log(None)

    def __serve_build_asgi_app__(self) -> Any:
        # Serve itself sends nothing to an ingress that is not ready
        return create_app(self._remote, self._keys, metrics=Metrics(), log=self._log, probes=Probes())


async def _behind(first: ResponseChunk, rest: AsyncIterator[ResponseChunk]) -> AsyncIterator[ResponseChunk]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _data_url(file: bytes | Video) -> str:
    kind, content = ("video", file.source) if isinstance(file, Video) else ("image", file)
    return f"data:{kind}/any;base64," + base64.b64encode(content).decode()


def _sticky(session: str) -> dict[str, Any]:
    return {"session_id": session} if session else {}


def _of_id(identity: str) -> str:
    if CONTEXT_ID.fullmatch(identity) is None:
        raise ServiceError(404, "there is no context of this name", code="context_not_found")
    return identity[4 : 4 + _DIGITS]


def _with_urls(messages: list[Message], urls: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the messages as dictionaries, with their image URLs replaced in order."""
    left = list(urls)
    changed = [message.model_dump(exclude_none=True) for message in messages]
    for message in changed:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] != "text" and left:
                part[part["type"]]["url"] = left.pop(0)
    return changed


def _no_replica() -> ServiceError:
    return ServiceError(503, "no replica could answer; try again later", code="no_replica", retry_after=2)
