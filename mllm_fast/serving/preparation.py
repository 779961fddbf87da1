"""Prepare requests for the engine: read images, tokenize prompts, and find contexts."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..context.context import Context
from ..context.scores import count_of
from ..context.store import ContextStore
from ..core.images import image_size, load_image
from ..core.video import LoadedVideo, Video
from ..models.divided_prompts import divided, ids_after_image
from ..models.media import parts_of_layout
from ..runtime.model_runner import ModelRunner
from ..runtime.prefill import check_sliding
from .errors import ServiceError, service_error
from .image_fetch import picture_files
from .messages import Conversation
from .requests import ContextSpec, Generation
from .responses import key_of, no_context
from .schema import ChatRequest
from .settings import Settings

_MEMO = 4096  # how many images' context keys are remembered
_LOOK = 0.01  # seconds between two looks at a context that is being made
_SHORT = 4000  # characters that are tokenized in the event loop's own thread


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
        building: Returns whether the context of a key is being made and was announced in an answer.
    """

    def __init__(
        self,
        vlm: ModelRunner,
        settings: Settings,
        store: ContextStore,
        building: Callable[[str], bool] = lambda _: False,
    ):
        self.vlm, self.settings, self.store, self._building = vlm, settings, store, building
        self.pool = ThreadPoolExecutor(1, "prepare")
        self._memo: OrderedDict[tuple[Any, ...], str] = OrderedDict()

    async def run(self, do: Callable[[], Any]) -> Any:
        """Call `do` in the preparer's thread and return its result."""
        return await in_pool(self.pool, do)

    async def until_built(self, key: str) -> None:
        """Wait while the context of a key is being made."""
        until = time.monotonic() + self.settings.time_limit
        while self._building(key) and time.monotonic() < until:
            await asyncio.sleep(_LOOK)

    def images(self, files: Sequence[Any]) -> list[Any]:
        """Decode the images and videos of a request.

        Raises:
            ServiceError: The images together are too large.
            InputError: A file is no image or no video, or too large.
        """
        left = self.settings.max_request_pixels - check_pixels(files, self.settings)
        found: list[Any] = []
        for one in files:
            if isinstance(one, (Video, LoadedVideo)):
                found.append(self.vlm.prompts.videos.load(one, self.settings.max_pixels, left))
                width, height = found[-1].size
                left -= width * height * len(found[-1].frames)
            else:
                found.append(load_image(one, self.settings.max_pixels))
        return found

    def generation(self, prepared: PreparedRequest, count: int, deadline: float) -> Generation:
        """Return the generation for the engine. The caller still has to set its sink."""
        return Generation(
            sink=lambda _: None,
            stop_ids=self.vlm.settings().end_ids,
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

    async def remembered(
        self, asked: Conversation, request: ChatRequest, tenant: str, count: int
    ) -> PreparedRequest | None:
        """Prepare a chat request that has no images, or whose context is in memory.

        Args:
            asked: The conversation of the request.
            request: The request.
            tenant: The tenant whose contexts may be used.
            count: The largest number of tokens of the answer.

        Returns:
            The prepared request; None if images must be read first, see `chat`.

        Raises:
            ServiceError: The request cannot be answered.
        """
        if request.context is not None:
            if asked.urls:
                raise ServiceError(400, "give images or a context, not both", param="context")
            key = key_of(request.context, tenant)
            await self.until_built(key)
            found = await self.run(lambda: self.store.find(key, self.vlm))
            if found is None or found.settings["keep"] == "off":
                raise no_context(request.context)
            return await self.run(lambda: self._after_context(key, found, None, asked, count))
        if not asked.urls:
            return await self.run(lambda: self._whole(asked, [], count, tenant))
        keep = self._keep(request)
        if keep is None:
            return await self.run(lambda: self._after_prefix(asked, tenant, count))
        memo = self._name(asked, tenant, keep)
        key = self._memo.get(memo, "") if memo else ""
        found = self.store.held(key) if key else None
        if found is None:
            return None
        self._memo.move_to_end(memo)  # type: ignore[arg-type]
        if asked.length > _SHORT:
            return await self.run(lambda: self._after_context(key, found, None, asked, count))
        try:  # in the event loop's own thread, which is fastest
            return self._after_context(key, found, None, asked, count)
        except Exception as error:
            raise service_error(error) from error

    async def chat(self, asked: Conversation, request: ChatRequest, tenant: str, count: int) -> PreparedRequest:
        """Prepare a chat request whose images must be read; the arguments are those of `remembered`."""
        settings, keep = self.settings, self._keep(request)
        files = await picture_files(asked.urls, settings)
        if keep is None:
            return await self.run(lambda: self._whole(asked, files, count, tenant))

        def prepare() -> PreparedRequest:
            made = self.of_images(files, keep, settings.prompt, settings.score, tenant)
            return self._after_context(made.key, made.context, made.spec, asked, count)

        prepared = await self.run(prepare)
        self._note(asked, self._name(asked, tenant, keep), prepared.key)
        return prepared

    def _note(self, asked: Conversation, name: tuple[Any, ...], key: str) -> None:
        """Remember the key of a context under a name."""
        if any(url[:5].lower() != "data:" for url in asked.urls):  # the image at another URL may change
            return
        self._memo[name] = key
        while len(self._memo) > _MEMO:
            self._memo.popitem(last=False)

    def _keep(self, request: ChatRequest) -> float | int | None:
        if request.keep is None:
            return self.settings.keep
        return None if request.keep == "off" else request.keep

    def _name(self, asked: Conversation, tenant: str, keep: float | int) -> tuple[Any, ...]:
        """Return the name under which the context's key of these images is remembered."""
        return tenant, keep, type(keep), asked.digests

    def of_images(
        self, files: Sequence[Any], keep: Any, prompt: str, score: str, tenant: str, budget: str = "all"
    ) -> PreparedRequest:
        """Find the context of some images, or return how to make it."""
        pictures = self.images(files)
        length = self.settings.describe_tokens
        about = {"keep": keep, "budget": budget, "prompt": prompt, "score": score, "parts": "query+image"}
        about["max_new_tokens"] = length
        key = self.store.key(self.vlm, pictures, about, tenant)
        found = self.store.find(key, self.vlm)
        if found is not None:
            return PreparedRequest(key, found)
        inputs, (layout,), _ = self.vlm.prompts.prepare([pictures], [prompt])
        count_of(keep, layout, budget)
        self._check_window(layout.length + length, "the images and their description take")
        return PreparedRequest(key, spec=ContextSpec(inputs, layout, prompt, keep, score, length, budget=budget))

    def _after_context(
        self, key: str, context: Context | None, spec: ContextSpec | None, asked: Conversation, count: int
    ) -> PreparedRequest:
        """Tokenize the turns that follow a context."""
        source: Any = spec if context is None else context
        ids = self.vlm.prompts.further_ids(source.prompt, parts_of_layout(source.layout), asked.spoken)
        length = source.layout.length + len(ids) + count
        self._check_window(length, "the images, the conversation and the longest answer take")
        return PreparedRequest(key, context, spec, ids)

    def _check_window(self, length: int, what: str) -> None:
        self.vlm.prompts.check_window(length, what)
        check_sliding(self.vlm.text, length)

    def _whole(self, asked: Conversation, files: Sequence[Any], count: int, tenant: str) -> PreparedRequest:
        """Prepare a prompt that is read word for word, its images' part from the store if it is there."""
        pictures, prompts = self.images(files), self.vlm.prompts
        inputs, layout = prompts.conversation(pictures, asked.turns)
        self._check_window(layout.length + count, "the conversation and the longest answer take")
        ids = inputs["input_ids"][0].tolist()
        if prompts.image_tokens.image not in ids[:-1]:
            return PreparedRequest(inputs=inputs, layout=layout)
        end = len(ids) - ids[::-1].index(prompts.image_tokens.image)  # behind the last image token
        key = self.store.key(self.vlm, pictures, {"keep": "off", "ids": ids[:end]}, tenant)
        parts = divided(prompts, asked.turns)
        if parts is not None and ids_after_image(prompts, parts[1]) == ids[end:]:
            self._note(asked, (tenant, "off", asked.digests, parts[0]), key)
        found = self.store.held(key)
        spec = None
        if found is None:
            first = {
                name: value[:, :end] if isinstance(value, Tensor) and value.shape == (1, len(ids)) else value
                for name, value in inputs.items()
            }
            marks = layout.separators[layout.separators < end]
            short = replace(layout, length=end, prompt_length=end, separators=marks)
            spec = ContextSpec(first, short, "", 1.0, "", 0, whole=True)
        return PreparedRequest(key, found, spec, ids[end:], inputs, layout)

    def _after_prefix(self, asked: Conversation, tenant: str, count: int) -> PreparedRequest | None:
        """Prepare a prompt whose images' part is in memory, without reading the images; None if it is not there."""
        prompts = self.vlm.prompts
        parts = divided(prompts, asked.turns)
        name = None if parts is None else (tenant, "off", asked.digests, parts[0])
        key = "" if name is None else self._memo.get(name, "")
        found = self.store.held(key) if key else None
        ids = None if parts is None or found is None else ids_after_image(prompts, parts[1])
        if found is None or not ids:
            return None
        self._check_window(found.layout.length + len(ids) + count, "the conversation and the longest answer take")
        return PreparedRequest(key, found, None, ids)


def check_pixels(files: Sequence[Any], settings: Settings) -> int:
    """Check the sizes of the image files of a request before any is decoded, and return their pixels.

    Videos are checked when they are read.

    Raises:
        ServiceError: The images together are too large.
        InputError: A file is no image, or too large.
    """
    pixels = 0
    for one in files:
        if isinstance(one, (Video, LoadedVideo)):
            continue
        width, height = image_size(one, settings.max_pixels)
        pixels += width * height
    if pixels > settings.max_request_pixels:
        raise ServiceError(
            413,
            f"the images of a request have at most {settings.max_request_pixels:,} pixels together, got {pixels:,};"
            " make them smaller",
            param="messages",
        )
    return pixels


async def in_pool(pool: ThreadPoolExecutor, do: Callable[[], Any]) -> Any:
    """Call `do` in a thread of the pool and return its result. Any exception becomes a `ServiceError`."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, do)
    except Exception as error:
        raise service_error(error) from error
