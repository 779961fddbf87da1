"""The service: it answers the requests of the HTTP routes and of Ray Serve replicas."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, cast

from ..context.store import ContextStore
from ..core.errors import InputError
from ..explain.export import encoded
from ..explain.registry import methods_without_detector
from ..knockout.rule import Knockout
from ..runtime.sampling import Sampling
from .budgets import Lane, Place
from .chunks import Closing, response_chunks
from .detokenizer import AnswerDetokenizer
from .engine import Engine
from .engine_client import EngineClient
from .errors import ServiceError, service_error
from .image_fetch import picture_files
from .interruptible import Interruptible, number_count
from .messages import Conversation, check_length, conversation
from .preparation import RequestPreparer, in_pool
from .requests import FailureEvent, FinishEvent, PrefillEvent, StoppingError
from .responses import ResponseChunk, info_of, key_of, no_context
from .schema import ChatRequest, ContextInfo, ContextRequest, ExplanationRequest
from .settings import Settings

if TYPE_CHECKING:
    from ..context.context import Context
    from ..explain.scores import Scores
    from ..vlm import VLM

_READ_AHEAD = 8  # requests whose images are decoded and wait for the engine
_EXPLAINED = 2  # explanations made at once
_UNWRITTEN = 64  # contexts that wait to be written to the store
_NUMBERS = 4_000_000  # in an explanation that is sent as text
_WINDOW = 1 << 17  # positions of a model that names no limit


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
        )
        self.client = EngineClient(self.engine, self.settings.time_limit)
        self._preparer = RequestPreparer(vlm, self.settings, self.store)
        self._scoring = ThreadPoolExecutor(1, "score")
        self._writing = ThreadPoolExecutor(1, "write")
        self._looking = ThreadPoolExecutor(1, "look")  # a large store is listed beside the answers
        self._unwritten: set[Future[None]] = set()
        self._stopping = threading.Event()
        most, each = self.settings.max_batch + self.settings.max_queue, self.settings.max_client_requests
        self._requests = Lane("requests", most, 0, each)
        self._images = Lane("requests with new images", _READ_AHEAD, self.settings.max_queue, each)
        self._explanations = Lane(
            "explanations", _EXPLAINED, self.settings.max_explanations, self.settings.max_client_explanations
        )
        self._lookups = Lane("requests about the store", 1, self.settings.max_queue, each)

    async def start(self) -> None:
        """Start the engine, and attach it to the running event loop."""
        self.client.start()

    def stop(self) -> None:
        """Finish the requests in progress, and write the contexts that are not stored yet, within the time of grace."""
        until = time.monotonic() + self.settings.grace / 2
        self.engine.stop(self.settings.grace / 4)
        self._stopping.set()
        for pool in (self._preparer.pool, self._scoring, self._looking):
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
            wanted.sampling = Sampling(request.temperature or 0.0, request.top_p or 1.0, request.seed)
            wanted.log_probs = (request.top_logprobs or 0) if request.logprobs else None
            queue, wanted.sink = self.client.open_queue()
            self.client.submit(wanted)
        except BaseException:
            place.leave()
            if reading is not None:
                reading.leave()
            raise
        tokenizer = self.vlm.processor.tokenizer
        words = AnswerDetokenizer(tokenizer, stop)
        chunks = response_chunks(wanted, queue, words, tokenizer, reading.leave if reading else lambda: None)

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
        if len(request.images) > settings.max_pictures:
            raise ServiceError(400, f"a context holds at most {settings.max_pictures} images", param="images")
        keep = request.keep if request.keep is not None else settings.keep
        if keep is None:
            raise ServiceError(400, "this server keeps no contexts by default: say how much to keep", param="keep")
        prompt, score = request.prompt or settings.prompt, request.score or settings.score
        check_length(len(prompt), settings)
        client = client or tenant
        async with self._requests.place(client, 0.0), self._images.place(client, settings.time_limit):
            files = await picture_files([one.url for one in request.images], settings)
            found, key = await self._made(files, keep, prompt, score, tenant)
        return info_of(key, found)

    async def kept(self, pictures: list[Any], keep: float | int, tenant: str = "", client: str = "") -> Context:
        """Return the context of some images, from the store or newly built."""
        async with self._images.place(client or tenant, self.settings.time_limit):
            return (await self._made(pictures, keep, self.settings.prompt, self.settings.score, tenant))[0]

    async def _made(self, files: list[Any], keep: Any, prompt: str, score: str, tenant: str) -> tuple[Context, str]:
        self._check_writing()
        prepared = await self._preparer.run(lambda: self._preparer.of_images(files, keep, prompt, score, tenant))
        wanted = self._preparer.generation(prepared, 0, time.monotonic() + self.settings.time_limit)
        queue, wanted.sink = self.client.open_queue()
        self.client.submit(wanted)
        found: Context | None = None
        try:
            while not isinstance(event := await queue.get(), FinishEvent):
                if isinstance(event, FailureEvent):
                    raise service_error(event.error)
                if isinstance(event, PrefillEvent):
                    found = event.context
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
        found = await self._look(lambda: self.store.find(key, self.vlm), client or tenant)
        if found is None:
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
        self.engine.forget(key)
        async with self._lookups.place(client or tenant, self.settings.time_limit):
            # in the writing thread, since the context may still be being written
            there = await in_pool(self._writing, lambda: self.store.drop(key))
        if not there:
            raise no_context(identity)

    async def explain(self, request: ExplanationRequest, tenant: str = "", client: str = "") -> bytes:
        """Explain an answer.

        Returns:
            The explanation as a file, in the format that the request names.

        Raises:
            ServiceError: The request cannot be served.
        """
        settings = self.settings
        self._check_model(request.model)
        methods = methods_without_detector()
        if request.method not in methods:
            raise ServiceError(400, f"method is one of {', '.join(methods)}", param="method")
        asked = conversation(request.messages, settings)
        check_length(len(request.answer or ""), settings)
        if len(asked.turns) != 1:
            raise ServiceError(400, "one question is explained, without earlier turns", param="messages")
        count = request.max_tokens or min(settings.default_tokens, settings.explain_tokens)
        if count > settings.explain_tokens:
            most = settings.explain_tokens
            raise ServiceError(400, f"answers of at most {most} tokens are explained", param="max_tokens")
        async with self._explanations.place(client or tenant, settings.time_limit):
            try:
                return await asyncio.wait_for(self._explained(request, asked, count), settings.time_limit)
            except asyncio.TimeoutError:
                raise service_error(TimeoutError()) from None

    async def _explained(self, request: ExplanationRequest, asked: Conversation, count: int) -> bytes:
        vlm, settings = self.vlm, self.settings
        question = "".join(part for part in asked.turns[0][1] if part is not None)
        files = await picture_files(asked.urls, settings)
        window = vlm.prompts.window or _WINDOW
        rules = await self._preparer.run(lambda: [Knockout.parse(text, most=window) for text in request.knockout])
        pictures = await self._preparer.run(lambda: self._preparer.images(files)) or None

        def pieces() -> Iterator[Any]:
            answer: Any = request.answer
            if answer is None:
                with vlm.stream(pictures, question, knockout=rules, max_new_tokens=count) as stream:
                    for _ in stream:
                        yield None
                    answer = stream.answer.token_ids
            elif len(vlm.prompts.answer_ids(answer)) > settings.explain_tokens:
                raise InputError(f"answers of at most {settings.explain_tokens} tokens are explained, this is longer")
            yield vlm.explain(pictures, question, answer, knockout=rules, final_norm=request.norm)

        made = await self.client.last(pieces)
        if request.token is not None:
            made.token_index(request.token)
        if request.format in ("json", "html") and number_count(made) > _NUMBERS:
            raise ServiceError(
                413,
                f"this explanation has more than {_NUMBERS:,} numbers: ask for format 'safetensors', for a shorter"
                " answer or for a smaller image",
                param="format",
            )
        return await self.scored(
            lambda check: encoded(
                cast("Scores", Interruptible(made, check)), request.format, request.token, request.method
            )
        )

    async def scored(self, do: Callable[[Callable[[], None]], Any]) -> Any:
        """Call `do` in a thread beside the engine and return its result.

        Scores need the weights and the recorded activations only, no forward pass.

        Args:
            do: The work. It calls its argument often, which ends the work with an exception when nobody waits for it.
        """
        given_up = threading.Event()

        def check() -> None:
            if given_up.is_set() or self._stopping.is_set():
                raise StoppingError

        def work() -> Any:
            check()
            return do(check)

        try:
            return await in_pool(self._scoring, work)
        finally:
            given_up.set()

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
        if self.settings.store is not None:
            writing = self._writing.submit(self.store.write, key, made)
            self._unwritten.add(writing)
            writing.add_done_callback(self._unwritten.discard)
        return kept
