"""The service: it answers the requests of the HTTP routes and of Ray Serve replicas."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from ..context.store import ContextStore
from ..core.errors import InputError
from ..models.fingerprint import fingerprint
from ..runtime.sampling import Sampling
from .budgets import Lane, Place
from .chunks import Closing, response_chunks
from .detokenizer import AnswerDetokenizer
from .engine import Engine
from .engine_client import EngineClient
from .errors import ServiceError, service_error
from .explainer import Explainer, ordered_pieces
from .image_fetch import picture_files, video_address
from .messages import check_length, conversation
from .preparation import RequestPreparer, in_pool
from .requests import FailureEvent, FinishEvent, PrefillEvent
from .responses import ResponseChunk, info_of, key_of, no_context
from .schema import ChatRequest, ContextInfo, ContextRequest, ExplanationRequest
from .settings import Settings
from .structured import Constraints

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM

_READ_AHEAD = 8  # requests whose images are decoded and wait for the engine
_UNWRITTEN = 64  # contexts that wait to be written to the store


class Service:
    """Answers requests with one model.

    Create and use it in one event loop. Only `stop` may be called from elsewhere.

    Args:
        vlm: The model.
        settings: The limits and defaults.
        name: The name by which requests call the model.
    """

    def __init__(self, vlm: VLM, settings: Settings | None = None, name: str = "shapes"):
        self.vlm = vlm
        self.name = name
        self.settings = settings or Settings()
        self.store = ContextStore(
            self.settings.store,
            memory_bytes=self.settings.memory_bytes,
            disk_bytes=self.settings.disk_bytes,
            storage=self.settings.storage,
        )
        self.engine = Engine(
            vlm,
            max_batch=self.settings.max_batch,
            max_queue=self.settings.max_queue,
            keep_context=self._keep_context,
            held=self.store.held,
            at_once=self.settings.first_answer == "whole",
        )
        if vlm.text.split is not None:
            check_divided(self.settings)
            fingerprint(vlm.model)  # which names contexts; it is known from now on without the other processes
        self.client = EngineClient(self.engine, self.settings.time_limit)
        self._preparer = RequestPreparer(vlm, self.settings, self.store, self.engine.scheduler.builders.announced)
        self.explainer = Explainer(vlm, self.settings, self.client, self._preparer)
        self._writing = ThreadPoolExecutor(1, "write")
        self._looking = ThreadPoolExecutor(1, "look")  # a large store is listed beside the answers
        self._schemas = ThreadPoolExecutor(1, "schemas")
        size = int(vlm.text.head.out_features)
        self._constraints = Constraints(vlm.processor.tokenizer, vlm.settings().end_ids, size)
        self._token_bytes = vlm.token_bytes
        self._unwritten: set[Future[None]] = set()
        most, each = self.settings.max_batch + self.settings.max_queue, self.settings.max_client_requests
        self._requests = Lane("requests", most, 0, each)
        self._images = Lane("requests with new images", _READ_AHEAD, self.settings.max_queue, each)
        self._lookups = Lane("requests about the store", 1, self.settings.max_queue, each)

    async def start(self) -> None:
        """Start the engine, and attach it to the running event loop."""
        self.client.start()

    def stop(self) -> None:
        """Finish the requests in progress, and write the contexts that are not stored yet, within the time of grace."""
        until = time.monotonic() + self.settings.grace / 2
        self.engine.stop(self.settings.grace / 4)
        self.explainer.stop()
        for pool in (self._preparer.pool, self._looking, self._schemas):
            pool.shutdown(wait=False, cancel_futures=True)
        wait(list(self._unwritten), max(0.0, until - time.monotonic()))
        self._writing.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: ChatRequest, tenant: str = "", client: str = "") -> AsyncIterator[ResponseChunk]:
        """Answer a chat request.

        Args:
            request: The request.
            tenant: The tenant whose contexts may be used.
            client: What the limits are counted by; the tenant by default.

        Returns:
            An iterator over the chunks of the answer, once the request is in the queue. Close it if it is not read to
            its end.

        Raises:
            ServiceError: The request cannot be answered. The iterator may raise it, too.
        """
        settings, client = self.settings, client or tenant
        self._check_model(request.model)
        asked = conversation(request.messages, settings)
        count = request.max_completion_tokens or request.max_tokens or settings.default_tokens
        if count > settings.max_tokens:
            raise ServiceError(400, f"at most {settings.max_tokens} tokens can be asked for", param="max_tokens")
        deadline = time.monotonic() + settings.time_limit
        place = await self._requests.enter(client, 0.0)
        reading: Place | None = None
        try:
            prepared = await self._preparer.remembered(asked, request, tenant, count)
            if prepared is None:
                self._check_writing()
                reading = await self._images.enter(client, settings.time_limit)
                prepared = await self._preparer.chat(asked, request, tenant, count)
            stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
            wanted = self._preparer.generation(prepared, count, deadline)
            wanted.sampling = Sampling(request.temperature, request.top_p, request.seed)
            if request.response_format is not None:
                wanted.constraint = await in_pool(self._schemas, lambda: self._constraints.of(request.response_format))
            wanted.log_probs = (request.top_logprobs or 0) if request.logprobs else None
            queue, wanted.sink = self.client.open_queue(None if reading is None else _until_read(reading))
            self.client.submit(wanted)
        except BaseException:
            place.leave()
            if reading is not None:
                reading.leave()
            raise
        words = AnswerDetokenizer(self.vlm.processor.tokenizer, stop)
        chunks = response_chunks(wanted, queue, words, self._token_bytes)

        def ended() -> None:
            self.engine.cancel(wanted)
            place.leave()
            if reading is not None:
                reading.leave()

        return Closing(chunks, ended)

    async def create(self, request: ContextRequest, tenant: str = "", client: str = "") -> ContextInfo:
        """Read images and store their context.

        Args:
            request: The images, and how much of them to keep.
            tenant: The tenant that the context belongs to.
            client: What the limits are counted by; the tenant by default.

        Raises:
            ServiceError: The images cannot be read, or the request or the server's limits do not allow it.
        """
        settings = self.settings
        urls = [*(one.url for one in request.images), *map(video_address, request.videos)]
        if not 1 <= len(urls) <= settings.max_pictures:
            raise ServiceError(
                400, f"a context holds 1 to {settings.max_pictures} images and videos, got {len(urls)}", param="images"
            )
        keep = request.keep if request.keep is not None else settings.keep
        if keep is None:
            raise ServiceError(400, "this server keeps no contexts by default: say how much to keep", param="keep")
        prompt, score = request.prompt or settings.prompt, request.score or settings.score
        check_length(len(prompt), settings)
        client = client or tenant
        async with self._requests.place(client, 0.0), self._images.place(client, settings.time_limit):
            files = await picture_files(urls, settings)
            found, key = await self._made(files, keep, prompt, score, tenant, request.budget)
        return info_of(key, found)

    async def kept(self, pictures: list[Any], keep: float | int, tenant: str = "", client: str = "") -> Context:
        """Return the context of some images, from the store or newly built."""
        async with self._images.place(client or tenant, self.settings.time_limit):
            return (await self._made(pictures, keep, self.settings.prompt, self.settings.score, tenant))[0]

    async def _made(
        self, files: list[Any], keep: Any, prompt: str, score: str, tenant: str, budget: str = "all"
    ) -> tuple[Context, str]:
        self._check_writing()
        prepared = await self._preparer.run(
            lambda: self._preparer.of_images(files, keep, prompt, score, tenant, budget)
        )
        wanted = self._preparer.generation(prepared, 0, time.monotonic() + self.settings.time_limit)
        queue, wanted.sink = self.client.open_queue()
        self.client.submit(wanted)
        found: Context | None = None
        try:
            while not isinstance(event := await queue.get(), FinishEvent):
                if isinstance(event, FailureEvent):
                    raise service_error(event.error)
                if isinstance(event, PrefillEvent):
                    found = event.context  # type: ignore[assignment]  # who asks for a context waits for it
        finally:
            self.engine.cancel(wanted)
        assert found is not None
        return found, prepared.key

    async def context(self, identity: str, tenant: str = "", kept: bool = False, client: str = "") -> ContextInfo:
        """Describe a context.

        Args:
            identity: The context's id.
            tenant: The tenant that the context belongs to.
            kept: Whether to include the image tokens that each layer keeps.
            client: What the limits are counted by; the tenant by default.

        Raises:
            ServiceError: The tenant has no such context.
        """
        key = key_of(identity, tenant)
        await self._preparer.until_built(key)
        found = await self._look(lambda: self.store.find(key, self.vlm), client or tenant)
        if found is None or found.settings["keep"] == "off":
            raise no_context(identity)
        return info_of(key, found, kept)

    async def contexts(self, tenant: str = "", client: str = "") -> list[str]:
        """Return the ids of all contexts of a tenant."""
        return [f"ctx-{key}" for key in await self._look(lambda: self.store.keys(tenant), client or tenant)]

    async def _look(self, do: Callable[[], Any], client: str) -> Any:
        async with self._lookups.place(client, self.settings.time_limit):
            return await in_pool(self._looking, do)

    async def delete(self, identity: str, tenant: str = "", client: str = "") -> None:
        """Remove a context from memory and from the store.

        Raises:
            ServiceError: The tenant has no such context.
        """
        key = key_of(identity, tenant)
        await self._preparer.until_built(key)
        self.engine.forget(key)
        async with self._lookups.place(client or tenant, self.settings.time_limit):
            # in the writing thread, since the context may still be being written
            there = await in_pool(self._writing, lambda: self.store.drop(key))
        if not there:
            raise no_context(identity)

    async def explain(self, request: ExplanationRequest, tenant: str = "", client: str = "") -> bytes:
        """Explain an answer; see `Explainer.explain`."""
        self._check_model(request.model)
        return await self.explainer.explain(request, client or tenant)

    def _check_model(self, name: str) -> None:
        if name not in ("", self.name):
            raise ServiceError(404, f"the model here is {self.name!r}", param="model", code="model_not_found")

    def _check_writing(self) -> None:
        """Refuse new contexts while the store is far behind.

        Raises:
            ServiceError: Too many contexts wait to be written.
        """
        if len(self._unwritten) >= _UNWRITTEN:
            raise ServiceError(
                429,
                f"{_UNWRITTEN} contexts wait to be written to the store; try again later",
                code="store_busy",
                retry_after=2,
            )

    def _keep_context(self, key: str, made: Context) -> Context:
        kept = self.store.keep(key, made)
        if self.settings.store is not None and made.settings["keep"] != "off":
            writing = self._writing.submit(self.store.write, key, made)
            self._unwritten.add(writing)
            writing.add_done_callback(self._unwritten.discard)
        return kept


def check_divided(settings: Settings) -> None:
    """Raise InputError for settings that a model cannot be served with that is divided between processes."""
    if settings.store is not None or settings.storage != "full":
        raise InputError(
            "a model that is divided between processes keeps its contexts in memory, as they are: leave the store out"
        )


def follow(vlm: VLM, settings: Settings) -> None:
    """Run the engine of a model that is divided between processes on another rank than the first, until that stops.

    Signals are left to the first rank.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    check_divided(settings)
    fingerprint(vlm.model)
    engine = Engine(
        vlm,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        at_once=settings.first_answer == "whole",
        make_task=partial(ordered_pieces, vlm),
    )
    engine.follow()


def _until_read(place: Place) -> Callable[[Any], None]:
    """Return what gives a place back as soon as the images of a request are no longer held, given its events."""

    def seen(event: Any) -> None:
        if isinstance(event, (PrefillEvent, FinishEvent, FailureEvent)):
            place.leave()

    return seen
