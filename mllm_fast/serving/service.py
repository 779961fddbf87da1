"""The service: it answers the requests of the HTTP routes and of Ray Serve replicas."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..context.store import ContextStore
from ..explain.export import encoded
from ..explain.registry import methods_without_detector
from ..knockout.rule import Knockout
from ..runtime.sampling import Sampling
from .chunks import response_chunks
from .detokenizer import AnswerDetokenizer
from .engine import Engine
from .engine_client import EngineClient
from .errors import ServiceError, service_error
from .image_fetch import picture_bytes
from .messages import conversation
from .preparation import RequestPreparer, in_pool
from .requests import FailureEvent, FinishEvent, PrefillEvent
from .responses import ResponseChunk, info_of, key_of, no_context
from .schema import ChatRequest, ContextInfo, ContextRequest, ExplanationRequest
from .settings import Settings

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM

_STOP_SECONDS = 30.0


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

    async def start(self) -> None:
        """Start the engine, and attach it to the running event loop."""
        self.client.start()

    def stop(self) -> None:
        """Finish the requests in progress, and write the contexts that are not stored yet."""
        self.engine.stop(_STOP_SECONDS)
        for pool in (self._preparer.pool, self._scoring, self._writing):
            pool.shutdown(wait=True)

    async def chat(self, request: ChatRequest, tenant: str = "") -> AsyncIterator[ResponseChunk]:
        """Answer a chat request.

        Args:
            request: The request.
            tenant: The tenant whose contexts may be used.

        Returns:
            An iterator over the chunks of the answer, once the request is in the queue.

        Raises:
            ServiceError: The request cannot be answered. The iterator may raise it, too.
        """
        settings = self.settings
        self._check_model(request.model)
        asked = conversation(request.messages, settings.max_pictures)
        count = request.max_completion_tokens or request.max_tokens or settings.default_tokens
        if count > settings.max_tokens:
            raise ServiceError(400, f"at most {settings.max_tokens} tokens can be asked for", param="max_tokens")
        deadline = time.monotonic() + settings.time_limit
        prepared = await self._preparer.chat(asked, request, tenant, count)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        wanted = self._preparer.generation(prepared, count, deadline)
        wanted.sampling = Sampling(request.temperature or 0.0, request.top_p or 1.0, request.seed)
        wanted.log_probs = (request.top_logprobs or 0) if request.logprobs else None
        queue, wanted.sink = self.client.open_queue()
        self.client.submit(wanted)
        tokenizer = self.vlm.processor.tokenizer
        words = AnswerDetokenizer(tokenizer, stop)
        return response_chunks(wanted, queue, words, tokenizer, lambda: self.engine.cancel(wanted))

    async def create(self, request: ContextRequest, tenant: str = "") -> ContextInfo:
        """Read images and store their context.

        Args:
            request: The images, and how much of them to keep.
            tenant: The tenant that the context belongs to.

        Raises:
            ServiceError: The images cannot be read, or the request or the server's limits do not allow it.
        """
        settings = self.settings
        if len(request.images) > settings.max_pictures:
            raise ServiceError(400, f"a context holds at most {settings.max_pictures} images", param="images")
        keep = request.keep if request.keep is not None else settings.keep
        if keep is None:
            raise ServiceError(400, "this server keeps no contexts by default: say how much to keep", param="keep")
        files = [await picture_bytes(one.url, settings) for one in request.images]
        prompt, score = request.prompt or settings.prompt, request.score or settings.score
        found, key = await self._made(files, keep, prompt, score, tenant)
        return info_of(key, found)

    async def kept(self, pictures: list[Any], keep: float | int, tenant: str = "") -> Context:
        """Return the context of some images, from the store or newly built."""
        return (await self._made(pictures, keep, self.settings.prompt, self.settings.score, tenant))[0]

    async def _made(self, files: list[Any], keep: Any, prompt: str, score: str, tenant: str) -> tuple[Context, str]:
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

    async def context(self, identity: str, tenant: str = "", kept: bool = False) -> ContextInfo:
        """Describe a context.

        Args:
            identity: The context's id.
            tenant: The tenant that the context belongs to.
            kept: Whether to include the image tokens that each layer keeps.

        Raises:
            ServiceError: The tenant has no such context.
        """
        key = key_of(identity, tenant)
        found = await self._preparer.run(lambda: self.store.find(key, self.vlm))
        if found is None:
            raise no_context(identity)
        return info_of(key, found, kept)

    async def contexts(self, tenant: str = "") -> list[str]:
        """Return the ids of all contexts of a tenant."""
        return [f"ctx-{key}" for key in await self._preparer.run(lambda: self.store.keys(tenant))]

    async def delete(self, identity: str, tenant: str = "") -> None:
        """Remove a context from memory and from the store.

        Raises:
            ServiceError: The tenant has no such context.
        """
        key = key_of(identity, tenant)
        self.engine.forget(key)
        # in the writing thread, since the context may still be being written
        if not await in_pool(self._writing, lambda: self.store.drop(key)):
            raise no_context(identity)

    async def explain(self, request: ExplanationRequest, tenant: str = "") -> bytes:
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
        asked = conversation(request.messages, settings.max_pictures)
        if len(asked.turns) != 1:
            raise ServiceError(400, "one question is explained, without earlier turns", param="messages")
        question = "".join(part for part in asked.turns[0][1] if part is not None)
        count = min(request.max_tokens or settings.default_tokens, settings.max_tokens)
        files = [await picture_bytes(url, settings) for url in asked.urls]
        rules = await self._preparer.run(lambda: [Knockout.parse(text) for text in request.knockout])
        pictures = await self._preparer.run(lambda: [self._preparer.image(one) for one in files]) or None
        vlm = self.vlm

        def pieces() -> Iterator[Any]:
            answer: Any = request.answer
            if answer is None:
                with vlm.stream(pictures, question, knockout=rules, max_new_tokens=count) as stream:
                    for _ in stream:
                        yield None
                    answer = stream.answer.token_ids
            yield vlm.explain(pictures, question, answer, knockout=rules, final_norm=request.norm)

        made = await self.client.last(pieces)
        if request.token is not None:
            made.token_index(request.token)

        return await self.scored(lambda: encoded(made, request.format, request.token, request.method))

    async def scored(self, do: Callable[[], Any]) -> Any:
        """Call `do` in a thread beside the engine and return its result.

        Scores need the weights and the recorded activations only, no forward pass.
        """
        return await in_pool(self._scoring, do)

    def _check_model(self, name: str) -> None:
        if name not in ("", self.name):
            raise ServiceError(404, f"the model here is {self.name!r}", param="model", code="model_not_found")

    def _keep_context(self, key: str, made: Context) -> Context:
        kept = self.store.keep(key, made)
        if self.settings.store is not None:
            self._writing.submit(self.store.write, key, made)
        return kept
