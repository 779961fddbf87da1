"""Prepare requests for the engine: read images, tokenize prompts, and find contexts."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..context.context import Context
from ..context.scores import kept_count
from ..context.store import ContextStore
from ..core.images import load_image
from ..runtime.model_runner import ModelRunner
from ..runtime.prefill import check_sliding
from .errors import ServiceError, service_error
from .image_fetch import picture_bytes
from .messages import Conversation
from .requests import ContextSpec, Generation
from .responses import key_of, no_context
from .schema import ChatRequest
from .settings import Settings

_MEMO = 4096  # how many images' context keys are remembered


@dataclass
class PreparedRequest:
    """The parts of a request that the engine needs.

    Attributes:
        key: The context's key in the store.
        context: The context, if it exists already.
        spec: How to make the context, if it does not exist.
        ids: The token ids that follow the context.
        inputs: The processor's output for a prompt that is read whole, without a context.
        layout: The layout of such a prompt.
    """

    key: str = ""
    context: Context | None = None
    spec: ContextSpec | None = None
    ids: list[int] = field(default_factory=list)
    inputs: Any = None
    layout: Any = None


class RequestPreparer:
    """Prepares requests in one thread beside the event loop, because tokenizers and processors are not thread-safe.

    Args:
        vlm: The model.
        settings: The limits and defaults of the service.
        store: The store of contexts.
    """

    def __init__(self, vlm: ModelRunner, settings: Settings, store: ContextStore):
        self.vlm, self.settings, self.store = vlm, settings, store
        self.pool = ThreadPoolExecutor(1, "prepare")
        self._memo: OrderedDict[tuple[Any, ...], str] = OrderedDict()

    async def run(self, do: Callable[[], Any]) -> Any:
        """Call `do` in the preparer's thread and return its result."""
        return await in_pool(self.pool, do)

    def image(self, file: Any) -> Any:
        """Decode the image file of a request."""
        return load_image(file, self.settings.max_pixels)

    def generation(self, prepared: PreparedRequest, count: int, deadline: float) -> Generation:
        """Return the generation for the engine. The caller still has to set its sink."""
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

    async def chat(self, asked: Conversation, request: ChatRequest, tenant: str, count: int) -> PreparedRequest:
        """Prepare a chat request.

        A request whose context is in memory and whose key is remembered is prepared in the event loop's own thread.

        Args:
            asked: The conversation of the request.
            request: The request.
            tenant: The tenant whose contexts may be used.
            count: The largest number of tokens of the answer.

        Raises:
            ServiceError: The request cannot be answered.
        """
        settings = self.settings
        if request.context is not None:
            if asked.urls:
                raise ServiceError(400, "give images or a context, not both", param="context")
            key = key_of(request.context, tenant)
            found = await self.run(lambda: self.store.find(key, self.vlm))
            if found is None:
                raise no_context(request.context)
            return await self.run(lambda: self._after_context(key, found, None, asked, count))
        keep = settings.keep if request.keep is None else (None if request.keep == "off" else request.keep)
        if keep is None or not asked.urls:
            files = [await picture_bytes(url, settings) for url in asked.urls]
            return await self.run(lambda: self._whole(asked, files, count))
        name = tuple(hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest() for url in asked.urls)
        memo = (tenant, keep, type(keep), name)
        key = self._memo.get(memo, "")
        found = self.store.held(key) if key else None
        if found is not None:
            self._memo.move_to_end(memo)
            try:
                return self._after_context(key, found, None, asked, count)
            except Exception as error:
                raise service_error(error) from error
        files = [await picture_bytes(url, settings) for url in asked.urls]

        def prepare() -> PreparedRequest:
            made = self.of_images(files, keep, settings.prompt, settings.score, tenant)
            return self._after_context(made.key, made.context, made.spec, asked, count)

        prepared = await self.run(prepare)
        if not any(url[:5].lower() != "data:" for url in asked.urls):  # the image at another URL may change
            self._memo[memo] = prepared.key
            while len(self._memo) > _MEMO:
                self._memo.popitem(last=False)
        return prepared

    def of_images(self, files: list[bytes], keep: Any, prompt: str, score: str, tenant: str) -> PreparedRequest:
        """Find the context of some images, or return how to make it."""
        pictures = [self.image(one) for one in files]
        length = self.settings.describe_tokens
        about = {"keep": keep, "prompt": prompt, "score": score, "parts": "query+image", "max_new_tokens": length}
        key = self.store.key(self.vlm, pictures, about, tenant)
        found = self.store.find(key, self.vlm)
        if found is not None:
            return PreparedRequest(key, found)
        inputs, (layout,), _ = self.vlm.prompts.prepare([pictures], [prompt])
        kept_count(keep, len(layout.positions("image")))
        self._check_window(layout.length + length, "the images and their description take")
        return PreparedRequest(key, spec=ContextSpec(inputs, layout, prompt, keep, score, length))

    def _after_context(
        self, key: str, context: Context | None, spec: ContextSpec | None, asked: Conversation, count: int
    ) -> PreparedRequest:
        """Tokenize the turns that follow a context."""
        source: Any = spec if context is None else context
        ids = self.vlm.prompts.further_ids(source.prompt, len(source.layout.images), asked.spoken)
        length = source.layout.length + len(ids) + count
        self._check_window(length, "the images, the conversation and the longest answer take")
        return PreparedRequest(key, context, spec, ids)

    def _check_window(self, length: int, what: str) -> None:
        self.vlm.prompts.check_window(length, what)
        check_sliding(self.vlm.text, length)

    def _whole(self, asked: Conversation, files: list[bytes], count: int) -> PreparedRequest:
        """Prepare a prompt that is read whole, without a context."""
        inputs, layout = self.vlm.prompts.conversation([self.image(one) for one in files], asked.turns)
        self._check_window(layout.length + count, "the conversation and the longest answer take")
        return PreparedRequest(inputs=inputs, layout=layout)


async def in_pool(pool: ThreadPoolExecutor, do: Callable[[], Any]) -> Any:
    """Call `do` in a thread of the pool and return its result. Any exception becomes a `ServiceError`."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, do)
    except Exception as error:
        raise service_error(error) from error
