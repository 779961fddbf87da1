"""Explanations of the service: made in the engine's thread, scored and encoded beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..core.errors import InputError
from ..core.images import load_image
from ..core.video import Video
from ..explain.export import encoded
from ..explain.registry import methods_without_detector
from ..knockout.rule import Knockout
from ..models.media import words_of
from .budgets import Lane
from .engine_client import EngineClient
from .errors import ServiceError, service_error
from .image_fetch import picture_files
from .interruptible import Interruptible
from .messages import Conversation, check_length, conversation
from .preparation import RequestPreparer, check_pixels, in_pool
from .requests import StoppingError
from .schema import ExplanationRequest
from .settings import Settings

if TYPE_CHECKING:
    from ..explain.explanation import Explanation
    from ..explain.scores import Scores
    from ..vlm import VLM

_AT_ONCE = 2
_NUMBERS = 4_000_000  # in an explanation that is sent as text
_WINDOW = 1 << 17  # positions of a model that names no limit


class Explainer:
    """Explains answers, two at a time.

    Args:
        vlm: The model.
        settings: The limits and defaults of the service.
        engine: Runs the model.
        preparer: Decodes the images.
    """

    def __init__(self, vlm: VLM, settings: Settings, engine: EngineClient, preparer: RequestPreparer):
        self.vlm, self.settings, self._engine, self._preparer = vlm, settings, engine, preparer
        self._lane = Lane("explanations", _AT_ONCE, settings.max_explanations, settings.max_client_explanations)
        most = _AT_ONCE + settings.max_explanations
        self._large = Lane("explanations of large images", 1, most, most)  # two would take too much memory
        self._pool = ThreadPoolExecutor(1, "score")
        self._ended = threading.Event()

    def stop(self) -> None:
        """End the scoring in progress, and take no more."""
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def explain(self, request: ExplanationRequest, client: str) -> bytes:
        """Explain an answer.

        Args:
            request: The request.
            client: What the limits are counted by.

        Returns:
            The explanation as a file, in the format that the request names.

        Raises:
            ServiceError: The request cannot be served.
        """
        settings = self.settings
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
        async with self._lane.place(client, settings.time_limit):
            try:
                return await asyncio.wait_for(self._explained(request, asked, count), settings.time_limit)
            except asyncio.TimeoutError:
                raise service_error(TimeoutError()) from None

    async def _explained(self, request: ExplanationRequest, asked: Conversation, count: int) -> bytes:
        settings = self.settings
        question = "".join(words_of(asked.turns[0][1]))
        files = await picture_files(asked.urls, settings)
        window = self.vlm.prompts.window or _WINDOW
        rules = await self._preparer.run(lambda: [Knockout.parse(text, most=window) for text in request.knockout])
        pixels = await self._preparer.run(lambda: check_pixels(files, settings))
        many = pixels > settings.max_pixels
        async with self._large.place("", settings.time_limit) if many else nullcontext():
            return await self._of_files(request, question, files, rules, count)

    async def _of_files(
        self,
        request: ExplanationRequest,
        question: str,
        files: list[Any],
        rules: list[Knockout],
        count: int,
    ) -> bytes:
        vlm, settings = self.vlm, self.settings
        if vlm.text.split is not None and any(isinstance(one, Video) for one in files):
            raise ServiceError(400, "a model divided between processes explains images, not videos", param="messages")

        def prepare() -> tuple[list[Any], Any]:  # the processor works on large images for a while
            found = self._preparer.images(files)
            return found, vlm.prompts.prepare([found], [question])

        pictures, prepared = await self._preparer.run(prepare)

        order: dict[str, Any] = {
            "question": question,
            "answer": request.answer,
            "knockout": request.knockout,
            "count": count,
            "most": settings.explain_tokens,
            "norm": request.norm,
        }
        if vlm.text.split is not None:  # scores need all processes, so they are made in the engine's thread too
            order |= {"format": request.format, "token": request.token, "method": request.method}
            order["max_pixels"] = settings.max_pixels
            return await self._engine.last(partial(encoded_pieces, vlm, order, pictures), (order, files))
        with vlm.prompts.ready.holding(pictures, question, prepared):
            made = await self._engine.last(partial(_pieces, vlm, order, pictures, rules))
        _check_size(made, request.format, request.token)
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
            if given_up.is_set() or self._ended.is_set():
                raise StoppingError

        def work() -> Any:
            check()
            return do(check)

        try:
            return await asyncio.wait_for(in_pool(self._pool, work), self.settings.time_limit)
        except asyncio.TimeoutError:
            raise service_error(TimeoutError()) from None
        finally:
            given_up.set()


def _pieces(
    vlm: VLM, order: dict[str, Any], pictures: list[Any], rules: list[Knockout]
) -> Iterator[Explanation | None]:
    """Yield None while an answer is generated, and then its explanation."""
    answer: Any = order["answer"]
    if answer is None:
        with vlm.stream(pictures or None, order["question"], knockout=rules, max_new_tokens=order["count"]) as stream:
            for _ in stream:
                yield None
            answer = stream.answer.token_ids
    elif len(vlm.prompts.answer_ids(answer)) > order["most"]:
        raise InputError(f"answers of at most {order['most']} tokens are explained, this is longer")
    yield vlm.explain(pictures or None, order["question"], answer, knockout=rules, final_norm=order["norm"])


def encoded_pieces(vlm: VLM, order: dict[str, Any], pictures: list[Any]) -> Iterator[bytes | None]:
    """Yield None while an explanation is made, and then the file of it: a side task of a divided model."""
    rules = [Knockout.parse(text, most=vlm.prompts.window or _WINDOW) for text in order["knockout"]]
    for made in _pieces(vlm, order, pictures, rules):
        if made is None:
            yield None
            continue
        _check_size(made, order["format"], order["token"])
        yield encoded(made, order["format"], order["token"], order["method"])


def ordered_pieces(vlm: VLM, order: dict[str, Any], files: list[bytes]) -> Iterator[bytes | None]:
    """Yield what `encoded_pieces` does, for the files of the images."""
    return encoded_pieces(vlm, order, [load_image(one, order["max_pixels"]) for one in files])


def _check_size(made: Explanation, form: str, token: Any) -> None:
    """Raise an error if an explanation has no such token, or too many numbers for its format."""
    if token is not None:
        made.token_index(token)
    if form in ("json", "html") and _number_count(made) > _NUMBERS:
        raise ServiceError(
            413,
            f"this explanation has more than {_NUMBERS:,} numbers: ask for format 'safetensors', for a shorter"
            " answer or for a smaller image",
            param="format",
        )


def _number_count(explanation: Any) -> int:
    """Return about how many numbers an explanation has as text: ten rows of position scores and two maps per token."""
    positions = len(explanation.input_ids)
    image = sum(len(one.positions) for one in explanation.layout.images)
    return len(explanation.tokens) * (10 * positions + 2 * image + explanation.num_layers * explanation.num_heads)
