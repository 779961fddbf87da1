"""The model's side of the browser tool: answers, maps, the words that heads write, and kept patches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from ..context.figure import draw_kept
from ..core.assets import CLIPS_WEIGHTS, SAMPLE, SHAPES_WEIGHTS
from ..core.errors import InputError
from ..core.images import load_image
from ..core.moments import time_label
from ..core.video import LoadedVideo, Video
from ..drawing.boxes import put_boxes
from ..drawing.heatmap import overlay
from ..explain.explanation import Explanation
from ..explain.export import encoded
from ..explain.figure import token_map
from ..explain.patch_words import patch_words
from ..explain.registry import ALIGNMENT, DEFAULT, HEATMAP_METHODS
from ..explain.video_maps import VideoMaps
from ..knockout.rule import Knockout
from ..models.media import shown as pictures_of
from .interruptible import Interruptible
from .service import Service
from .ui_inputs import ROUTES, Inputs, Limits

if TYPE_CHECKING:
    from ..context.context import Context
    from ..explain.stream import Stream
    from ..joint.model import JointModel

Picture = Image.Image | LoadedVideo
SIDE = 560  # the longer side of a drawn map, in pixels


@dataclass(frozen=True)
class Shown:
    """Selects a map. Without `head` and `layer` it is the map of the best heads of all layers.

    Attributes:
        token: The index of the token.
        head: The (layer, head) whose map is shown.
        layer: The layer whose heads are shown together.
        method: The heatmap method.
        moment: The image or the moment of a video, as an index of `Explanation.images`; None for that where the map is
            highest.
    """

    token: int
    head: tuple[int, int] | None = None
    layer: int | None = None
    method: str = DEFAULT
    moment: int | None = None

    def heads(self, ex: Explanation) -> Any:
        """Return the heads in the form that `Explanation.heatmap` accepts."""
        if self.head is not None:
            return [self.head]
        return 10 if self.layer is None else [(self.layer, number) for number in range(ex.num_heads)]


@dataclass
class Answered:
    """An answer with its explanation.

    Attributes:
        question: The question.
        explanation: The explanation of the answer.
        joint: Whether the joint model answered.
        note: Says that the answer was stopped or cut off; empty if it is whole.
        guard: A lock, so that only one thread at a time computes scores.
        shown: The map that the user looks at.
        moment: The image, or the moment of a video, that it is drawn over.
    """

    question: str
    explanation: Explanation
    joint: bool
    note: str = ""
    guard: asyncio.Lock = field(default_factory=asyncio.Lock)
    shown: Shown | None = None
    moment: int = 0


@dataclass(frozen=True)
class Drawn:
    """A drawn map.

    Attributes:
        image: The image with the map over it.
        meaning: What the colours mean.
        top: The value of the lightest colour.
        moment: The index of the image, or of the moment of a video.
    """

    image: Image.Image
    meaning: str
    top: float
    moment: int = 0


@dataclass(frozen=True)
class Heard:
    """The answer so far.

    Attributes:
        text: The text so far.
        tokens: Its tokens.
        map: The map of the last token.
        done: The complete answer with its explanation, at the end.
    """

    text: str
    tokens: list[str]
    map: Image.Image | None = None
    done: Answered | None = None


class UIBackend:
    """Runs the service's model for the browser tool.

    Args:
        service: The service.
        joint: A joint model of the same VLM, if there is one.
    """

    def __init__(self, service: Service, joint: JointModel | None = None):
        self.service, self.joint = service, joint
        self.vlm = service.vlm

    @property
    def embedded(self) -> bool:
        """Whether the model is an embedded one."""
        return Path(self.vlm.model.name_or_path) in (SHAPES_WEIGHTS, CLIPS_WEIGHTS)

    def limits(self, methods: Iterable[str]) -> Limits:
        """Return what the controls accept, given the heatmap methods that are offered."""
        settings = self.service.settings
        most = min(settings.max_tokens, settings.explain_tokens)  # every answer here is explained
        return Limits(len(self.vlm.text.layers), most, settings.default_tokens, tuple(methods), self.joint is not None)

    async def picture(self, path: Path) -> Image.Image:
        """Read an uploaded image, under the limits of the service."""
        most = self.service.settings.max_pixels
        return await asyncio.to_thread(lambda: load_image(path.read_bytes(), most))

    async def video(self, path: Path) -> LoadedVideo:
        """Read an uploaded video, under the limits of the service."""
        settings, videos = self.service.settings, self.vlm.prompts.videos

        def read() -> LoadedVideo:
            video = Video(path.read_bytes(), max_frames=settings.max_frames)
            return videos.load(video, settings.max_pixels, settings.max_request_pixels)

        return await asyncio.to_thread(read)

    async def is_sample(self, path: Path) -> bool:
        """Return whether an uploaded image has the pixels of the sample."""
        picture, sample = await self.picture(path), await self.picture(SAMPLE)
        return picture.size == sample.size and picture.tobytes() == sample.tobytes()

    async def answer(
        self, picture: Image.Image | LoadedVideo, asked: Inputs, stop: threading.Event
    ) -> AsyncIterator[Heard]:
        """Yield the answer token by token, each with its map, and at the end the whole explanation.

        Args:
            picture: The image, or the video.
            asked: The question, and how it is answered.
            stop: Set to end the answer; what was said until then is explained.
        """
        source = _source(self, asked)

        def pieces() -> Iterator[Heard]:
            with source.stream(picture, asked.question, explain=True, **asked.options) as stream:
                tokens = []
                for step in stream:
                    tokens.append(step.token)
                    yield Heard(step.text, list(tokens), _drawn(step.explanation, Shown(0)).image)
                    if stop.is_set():
                        break
                said = stream.answer
            note = "stopped" if stop.is_set() else ""
            if said.finish_reason == "length":
                note = f"cut off after {len(said.token_ids)} tokens; a longer answer can be allowed under Answer"
            ex = source.explain(picture, asked.question, said.token_ids)
            yield Heard(ex.text, ex.tokens, None, Answered(asked.question, ex, asked.joint, note))

        async for heard in self.service.client.run(pieces):
            yield heard

    async def impaired(
        self, picture: Image.Image | LoadedVideo, asked: Inputs, stop: threading.Event
    ) -> AsyncIterator[str]:
        """Yield the growing answer of the model with attention knocked out; `stop` ends it."""
        rules = [Knockout(*ROUTES[route], layers=range(asked.first, asked.last + 1)) for route in asked.knockout]
        source = _source(self, asked)

        def pieces() -> Iterator[str]:
            with source.stream(picture, asked.question, knockout=rules, **asked.options) as stream:
                yield from _growing(stream, stop)

        async for text in self.service.client.run(pieces):
            yield text

    async def compressed(
        self, picture: Image.Image | LoadedVideo, asked: Inputs, stop: threading.Event
    ) -> tuple[str, str, Image.Image]:
        """Answer from a context that keeps a share of the image tokens, of the model that answers.

        Args:
            picture: The image.
            asked: The question, the share, and how it is answered.
            stop: Set to end the answer.

        Returns:
            The answer, a sentence about the size of the context, and a drawing of the kept patches.
        """
        settings, keep = self.service.settings, asked.keep / 100
        ctx: Context
        if asked.joint:
            source = _source(self, asked)

            def read() -> Iterator[Context]:
                options = {"prompt": settings.prompt, "score": settings.score}
                yield source.compress(picture, keep, max_new_tokens=settings.describe_tokens, **options)

            ctx = await self.service.client.last(read)
        else:
            found = await self.service.kept([picture], keep, tenant="browser")
            ctx = replace(found, images=tuple(pictures_of([picture], found.layout)))

        def pieces() -> Iterator[str]:
            with ctx.stream(asked.question, **asked.options) as stream:
                yield from _growing(stream, stop)

        text = await self.service.client.last(pieces)
        facts = (
            f"{ctx.settings['kept']} of {len(ctx.layout.positions('image'))} image tokens a layer,"
            f" {ctx.nbytes / 1024:.0f} of {ctx.full_nbytes / 1024:.0f} KiB"
        )
        return text, facts, draw_kept(ctx)

    async def map(self, answered: Answered, shown: Shown) -> Drawn:
        """Draw the selected map."""
        ex = answered.explanation
        answered.shown = shown
        async with answered.guard:
            drawn = await self._scored(ex, lambda ex: _drawn(ex, shown), shown.method)
        answered.moment = drawn.moment
        return drawn

    async def patch(self, answered: Answered, pixel: tuple[int, int]) -> list[tuple[str, list[str]]]:
        """Return the words that a patch stands for before each layer, as (layer, words).

        Args:
            answered: The answer.
            pixel: A pixel (x, y) of the drawn map.

        Raises:
            InputError: No image token lies there.
        """
        ex, image = answered.explanation, answered.moment
        layout = ex.layout.images[image]
        width, height = ex.images[image].size
        scale = max(width, height) / SIDE  # the map's longer side is SIDE pixels
        token = layout.token_at(pixel[0] * scale, pixel[1] * scale)
        if token is None:
            raise InputError("the model does not see this part of the image: click on another")

        def read() -> list[tuple[str, list[str]]]:
            found = patch_words(ex, layout.positions[token : token + 1], k=5).of(0)
            return [("embedding" if layer == 0 else str(layer), words) for layer, words in found]

        async with answered.guard:
            return await self.service.client.last(lambda: iter([read()]))

    async def heads(self, answered: Answered, token: int) -> list[tuple[int, int, float, str]]:
        """Return the ten best heads of a token as (layer, head, score, the words that the head writes)."""
        ex = answered.explanation

        def found(ex: Explanation) -> list[tuple[int, int, float, str]]:
            rows = []
            for layer, head, score in ex.top_heads(token):
                words = ", ".join(word.strip() for word, _ in ex.project(token, layer, head, k=5))
                rows.append((layer, head, score, words))
            return rows

        async with answered.guard:
            return await self._scored(ex, found, "logprob")

    async def verified(self, answered: Answered, shown: Shown) -> str | None:
        """Check whether a word depends on the patches that its map shows, see `Explanation.verify`.

        Returns:
            The verdict in words, or None if another map was selected in the meantime.
        """
        ex = answered.explanation
        answered.shown = shown

        def check() -> Iterator[str]:
            (found,) = ex.verify(tokens=[shown.token], heads=shown.heads(ex), method=shown.method)
            yield f"{found.verdict}: \u201c{ex.tokens[shown.token].strip()}\u201d, {found}"

        async with answered.guard:
            words = await self.service.client.last(check)
        return words if answered.shown == shown else None

    async def report(self, answered: Answered, kind: str, method: str) -> bytes:
        """Return the explanation as a file of the given kind, such as "html" or "json"."""
        async with answered.guard:
            return await self._scored(answered.explanation, lambda ex: encoded(ex, kind, None, method), method)

    async def _scored(self, ex: Explanation, do: Callable[[Explanation], Any], method: str) -> Any:
        """Call `do` with an explanation beside the engine; it ends early if nobody waits.

        Gradient alignment changes what the model reads for a while, so it takes the engine's turn.
        """
        if method == ALIGNMENT:

            def piece() -> Iterator[Any]:
                yield do(ex)

            return await self.service.client.last(piece)
        return await self.service.explainer.scored(lambda check: do(cast("Explanation", Interruptible(ex, check))))


def _source(tool: UIBackend, asked: Inputs) -> Any:
    """Return the model that answers: the joint one if it is asked for."""
    return tool.joint if asked.joint else tool.vlm


def _growing(stream: Stream, stop: threading.Event) -> Iterator[str]:
    """Yield the text of an answer as it grows, until `stop` is set; "(nothing)" if the model says nothing."""
    text = ""
    for step in stream:
        text = step.text
        yield text
        if stop.is_set():
            break
    if not text:
        yield "(nothing)"


def _drawn(ex: Explanation, shown: Shown) -> Drawn:
    token, heads, method, images = shown.token, shown.heads(ex), shown.method, range(len(ex.images))
    maps = [token_map(ex, token, method, heads, image) for image in images]
    top = max(0.0, *(float(grid.max()) for grid, _, _ in maps))
    best = shown.moment if shown.moment is not None else max(images, key=lambda image: float(maps[image][0].max()))
    grid, box, boxes = maps[best]
    drawn = overlay(ex.images[best], grid, box, top, SIDE)
    put_boxes(drawn, boxes, SIDE / max(ex.images[best].size))
    meaning = HEATMAP_METHODS.get(method).meaning
    if method == ALIGNMENT:
        meaning += f"; the detector looks for “{ex.box_weights(token).query}”"
    elif method == "logprob":
        which = f"the {heads} best heads" if isinstance(heads, int) else _named(heads)
        meaning = f"increase of log p(token) by each patch, through {which}"
    moment = ex.layout.images[best].moment
    if moment is not None:
        share = VideoMaps(ex, moment.video).shares(token, method, heads)
        meaning += f"; at {time_label(moment)}, {100 * float(share[_place(ex, best)]):.0f} % of the video's part"
    return Drawn(drawn, meaning, top, best)


def _place(ex: Explanation, image: int) -> int:
    """Return which moment of its video an image is."""
    return next(moments.index(image) for moments in ex.layout.videos if image in moments)


def _named(heads: list[tuple[int, int]]) -> str:
    if len(heads) == 1:
        return f"head {heads[0][1]} of layer {heads[0][0]}"
    return f"all heads of layer {heads[0][0]}"
