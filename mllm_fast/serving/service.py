"""What the server does, whatever brings the requests: HTTP here, or Ray Serve's handles."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..context.scores import kept_count
from ..context.store import ContextStore
from ..core.images import load_image
from ..knockout.rule import Knockout
from ..runtime.sampling import Sampling
from .context_builder import ContextSpec
from .detokenizer import AnswerDetokenizer
from .engine import Engine
from .errors import ServiceError, service_error
from .event_queue import EventQueue
from .image_fetch import picture_bytes
from .messages import Conversation, conversation
from .requests import FailureEvent, FinishEvent, Generation, PrefillEvent, SideTask, TokenEvent
from .responses import ResponseChunk, info_of, key_of, no_context
from .schema import ChatRequest, ContextInfo, ContextRequest, Details, ExplanationRequest, Usage
from .settings import Settings

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM

_MEMO = 4096  # pictures whose contexts' names are remembered
_STOP_SECONDS = 30.0


@dataclass
class _Prepared:
    """What the engine needs of a request."""

    key: str = ""
    context: Context | None = None
    spec: ContextSpec | None = None
    ids: list[int] = field(default_factory=list)
    inputs: Any = None
    layout: Any = None


class Service:
    """Answers requests with one model. Made and used in one event loop, but for `stop`."""

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
        self._preparing = ThreadPoolExecutor(1, "prepare")  # one: tokenizers and processors are not made for several
        self._scoring = ThreadPoolExecutor(1, "score")
        self._writing = ThreadPoolExecutor(1, "write")
        self._memo: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._mail: EventQueue | None = None

    async def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._mail = EventQueue(asyncio.get_running_loop())
        self.engine.start()

    def stop(self) -> None:
        """Finish what runs, and write what is not written yet."""
        self.engine.stop(_STOP_SECONDS)
        for pool in (self._preparing, self._scoring, self._writing):
            pool.shutdown(wait=True)

    async def chat(self, request: ChatRequest, scope: str = "") -> AsyncIterator[ResponseChunk]:
        """Answer a request: its pieces, once it has a place in the queue.

        Raises:
            ServiceError: it cannot be answered; also from the iterator, once it was begun.
        """
        settings = self.settings
        self._check_model(request.model)
        asked = conversation(request.messages, settings.max_pictures)
        count = request.max_completion_tokens or request.max_tokens or settings.default_tokens
        if count > settings.max_tokens:
            raise ServiceError(400, f"at most {settings.max_tokens} tokens can be asked for", param="max_tokens")
        deadline = time.monotonic() + settings.time_limit
        prepared = await self._prepared(asked, request, scope, count)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        wanted = self._generation(prepared, count, deadline)
        wanted.sampling = Sampling(request.temperature or 0.0, request.top_p or 1.0, request.seed)
        wanted.log_probs = (request.top_logprobs or 0) if request.logprobs else None
        queue, wanted.sink = self._box()
        self._submit(wanted)
        return self._pieces(wanted, queue, AnswerDetokenizer(self.vlm.processor.tokenizer, stop))

    async def create(self, request: ContextRequest, scope: str = "") -> ContextInfo:
        """Read pictures and keep them."""
        settings = self.settings
        if len(request.images) > settings.max_pictures:
            raise ServiceError(400, f"a context holds at most {settings.max_pictures} pictures", param="images")
        keep = request.keep if request.keep is not None else settings.keep
        if keep is None:
            raise ServiceError(400, "this server keeps no contexts by default: say how much to keep", param="keep")
        files = [await picture_bytes(one.url, settings) for one in request.images]
        prompt, score = request.prompt or settings.prompt, request.score or settings.score
        found, key = await self._made(files, keep, prompt, score, scope)
        return info_of(key, found)

    async def kept(self, pictures: list[Any], keep: float | int, scope: str = "") -> Context:
        """The context of some pictures, found or made."""
        return (await self._made(pictures, keep, self.settings.prompt, self.settings.score, scope))[0]

    async def _made(self, files: list[Any], keep: Any, prompt: str, score: str, scope: str) -> tuple[Context, str]:
        prepared = await self._in(self._preparing, lambda: self._of_pictures(files, keep, prompt, score, scope))
        wanted = self._generation(prepared, 0, time.monotonic() + self.settings.time_limit)
        queue, wanted.sink = self._box()
        self._submit(wanted)
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

    async def context(self, identity: str, scope: str = "", kept: bool = False) -> ContextInfo:
        """A context of this scope; with `kept` the image tokens that each layer keeps, too."""
        key = key_of(identity, scope)
        found = await self._in(self._preparing, lambda: self.store.find(key, self.vlm))
        if found is None:
            raise no_context(identity)
        return info_of(key, found, kept)

    async def contexts(self, scope: str = "") -> list[str]:
        """The ids of all contexts of a scope."""
        return [f"ctx-{key}" for key in await self._in(self._preparing, lambda: self.store.keys(scope))]

    async def delete(self, identity: str, scope: str = "") -> None:
        """Remove a context from memory and from the store."""
        key = key_of(identity, scope)
        self.engine.forget(key)
        # behind its own writing, which may be under way
        if not await self._in(self._writing, lambda: self.store.drop(key)):
            raise no_context(identity)

    async def explain(self, request: ExplanationRequest, scope: str = "") -> bytes:
        """The file of an explanation, in the format that was asked for."""
        from ..explain.export import encoded
        from ..explain.registry import methods_without_detector

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
        rules = await self._in(self._preparing, lambda: [Knockout.parse(text) for text in request.knockout])
        pictures = await self._in(self._preparing, lambda: [self._picture(one) for one in files]) or None
        vlm = self.vlm

        def pieces() -> Iterator[Any]:
            answer: Any = request.answer
            if answer is None:
                with vlm.stream(pictures, question, knockout=rules, max_new_tokens=count) as stream:
                    for _ in stream:
                        yield None
                    answer = stream.answer.token_ids
            yield vlm.explain(pictures, question, answer, knockout=rules, norm=request.norm)

        made = await self.last(pieces)
        if request.token is not None:
            made.token_index(request.token)

        return await self.scored(lambda: encoded(made, request.format, request.token, request.method))

    async def scored(self, do: Callable[[], Any]) -> Any:
        """What `do` gives, computed beside the engine: scores need the weights and what was recorded, no pass."""
        return await self._in(self._scoring, do)

    async def run(self, make: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:
        """What the pieces of some work give, each made by the engine's thread between two passes."""
        queue, sink = self._box()
        work = SideTask(make, sink, time.monotonic() + self.settings.time_limit)
        self._submit(work)
        try:
            while not isinstance(event := await queue.get(), FinishEvent):
                if isinstance(event, FailureEvent):
                    raise service_error(event.error)
                yield event
        finally:
            self.engine.cancel(work)

    async def last(self, make: Callable[[], Iterator[Any]]) -> Any:
        """The last of what the pieces of some work give, None if there was none."""
        found: Any = None
        async for piece in self.run(make):
            found = piece
        return found

    def _submit(self, wanted: Generation | SideTask) -> None:
        try:
            self.engine.submit(wanted)
        except Exception as error:
            raise service_error(error) from None

    def _box(self) -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
        if self._mail is None:
            raise RuntimeError("start the service first")
        return self._mail.open()

    async def _in(self, pool: ThreadPoolExecutor, do: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, do)
        except Exception as error:
            raise service_error(error) from error

    def _check_model(self, name: str) -> None:
        if name not in ("", self.name):
            raise ServiceError(404, f"the model here is {self.name!r}", param="model", code="model_not_found")

    def _picture(self, file: Any) -> Any:
        return load_image(file, self.settings.max_pixels)

    def _keep_context(self, key: str, made: Context) -> Context:
        kept = self.store.keep(key, made)
        if self.settings.store is not None:
            self._writing.submit(self.store.write, key, made)
        return kept

    def _generation(self, prepared: _Prepared, count: int, deadline: float) -> Generation:
        return Generation(
            sink=lambda _: None,
            stop_ids=self.vlm.prompts.end_ids(),
            max_tokens=count,
            key=prepared.key,
            context=prepared.context,
            spec=prepared.spec,
            ids=prepared.ids,
            inputs=prepared.inputs,
            layout=prepared.layout,
            deadline=deadline,
            cached=prepared.context is not None,
        )

    async def _prepared(self, asked: Conversation, request: ChatRequest, scope: str, count: int) -> _Prepared:
        """Find what a request is about, in this thread where it is at hand."""
        settings = self.settings
        if request.context is not None:
            if asked.urls:
                raise ServiceError(400, "give pictures or a context, not both", param="context")
            key = key_of(request.context, scope)
            found = await self._in(self._preparing, lambda: self.store.find(key, self.vlm))
            if found is None:
                raise no_context(request.context)
            return await self._in(self._preparing, lambda: self._behind(key, found, None, asked, count))
        keep = settings.keep if request.keep is None else (None if request.keep == "off" else request.keep)
        if keep is None or not asked.urls:
            files = [await picture_bytes(url, settings) for url in asked.urls]
            return await self._in(self._preparing, lambda: self._whole(asked, files, count))
        name = tuple(hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest() for url in asked.urls)
        memo = (scope, keep, type(keep), name)
        key = self._memo.get(memo, "")
        found = self.store.held(key) if key else None
        if found is not None:
            self._memo.move_to_end(memo)
            try:
                return self._behind(key, found, None, asked, count)
            except Exception as error:
                raise service_error(error) from error
        files = [await picture_bytes(url, settings) for url in asked.urls]

        def prepare() -> _Prepared:
            made = self._of_pictures(files, keep, settings.prompt, settings.score, scope)
            return self._behind(made.key, made.context, made.spec, asked, count)

        prepared = await self._in(self._preparing, prepare)
        if not any(url[:5].lower() != "data:" for url in asked.urls):  # what is behind another URL may change
            self._memo[memo] = prepared.key
            while len(self._memo) > _MEMO:
                self._memo.popitem(last=False)
        return prepared

    def _of_pictures(self, files: list[bytes], keep: Any, prompt: str, score: str, scope: str) -> _Prepared:
        """The context of some pictures, or how to make it."""
        pictures = [self._picture(one) for one in files]
        length = self.settings.describe_tokens
        about = {"keep": keep, "prompt": prompt, "score": score, "parts": "query+image", "max_new_tokens": length}
        key = self.store.key(self.vlm, pictures, about, scope)
        found = self.store.find(key, self.vlm)
        if found is not None:
            return _Prepared(key, found)
        inputs, (layout,), _ = self.vlm.prompts.prepare([pictures], [prompt])
        kept_count(keep, len(layout.positions("image")))
        self.vlm.prompts.check_window(layout.length + length, "the pictures and their description take")
        return _Prepared(key, spec=ContextSpec(inputs, layout, prompt, keep, score, length))

    def _behind(
        self, key: str, context: Context | None, spec: ContextSpec | None, asked: Conversation, count: int
    ) -> _Prepared:
        """The turns that follow a context."""
        source: Any = spec if context is None else context
        ids = self.vlm.prompts.further_ids(source.prompt, len(source.layout.images), asked.spoken)
        length = source.layout.length + len(ids) + count
        self.vlm.prompts.check_window(length, "the pictures, the conversation and the longest answer take")
        return _Prepared(key, context, spec, ids)

    def _whole(self, asked: Conversation, files: list[bytes], count: int) -> _Prepared:
        """A prompt that is read whole."""
        inputs, layout = self.vlm.prompts.conversation([self._picture(one) for one in files], asked.turns)
        self.vlm.prompts.check_window(layout.length + count, "the conversation and the longest answer take")
        return _Prepared(inputs=inputs, layout=layout)

    async def _pieces(
        self, wanted: Generation, queue: asyncio.Queue[Any], words: AnswerDetokenizer
    ) -> AsyncIterator[ResponseChunk]:
        usage, info, logs = Usage(), None, []
        try:
            while True:
                event = await queue.get()
                if isinstance(event, FailureEvent):
                    raise service_error(event.error)
                if isinstance(event, PrefillEvent):
                    usage.prompt_tokens = event.prompt_tokens
                    usage.prompt_tokens_details = Details(cached_tokens=event.cached)
                    info = None if event.context is None else info_of(wanted.key, event.context, brief=True)
                    continue
                if isinstance(event, TokenEvent):
                    usage.completion_tokens += 1
                    if wanted.log_probs is not None:
                        logs.append(self._log_prob(event))
                    text = words.push(event.token)
                    if words.stopped:
                        self.engine.cancel(wanted)
                        event = FinishEvent("stop")
                    elif text:
                        yield ResponseChunk(text, tuple(logs))
                        logs = []
                    if not words.stopped:
                        continue
                else:
                    text = words.finish()
                usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
                yield ResponseChunk(text, tuple(logs), event.reason, usage, info)
                return
        finally:
            self.engine.cancel(wanted)

    def _log_prob(self, said: TokenEvent) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            text = self.vlm.processor.tokenizer.decode([token])
            return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

        return entry(said.token, said.log_prob) | {"top_logprobs": [entry(token, value) for token, value in said.top]}
