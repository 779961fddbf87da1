"""What the tool in the browser does, without the browser: answers, maps, words of heads, kept patches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..context.figure import draw_kept
from ..core.errors import InputError
from ..drawing.boxes import put_boxes
from ..drawing.heatmap import overlay
from ..explain.explanation import Explanation
from ..explain.export import encoded
from ..explain.figure import token_map
from ..explain.registry import ALIGNMENT, DEFAULT, HEATMAP_METHODS
from ..knockout.rule import Knockout
from .service import Service

if TYPE_CHECKING:
    from ..context.context import Context
    from ..joint.model import JointModel

SIDE = 560  # of a drawn map, pixels
ROUTES = {  # of attention that can be knocked out
    "image to question": ("image", "query"),
    "image to answer": ("image", "generated"),
    "question to answer": ("query", "generated"),
}
LIVE = ("logprob", "attention")  # maps that need no further pass


@dataclass(frozen=True)
class Shown:
    """Which map: of a token, by a method. `head`: of it alone; `layer`: of its heads; neither: of the best."""

    token: int
    head: tuple[int, int] | None = None
    layer: int | None = None
    method: str = DEFAULT

    def heads(self, ex: Explanation) -> Any:
        """The heads, as `Explanation.heatmap` takes them."""
        if self.head is not None:
            return [self.head]
        return 10 if self.layer is None else [(self.layer, number) for number in range(ex.num_heads)]


@dataclass
class Answered:
    """An answer and its explanation. `guard`: scores are made by one thread at a time."""

    picture: Image.Image
    question: str
    explanation: Explanation
    joint: bool
    guard: asyncio.Lock = field(default_factory=asyncio.Lock)
    shown: Shown | None = None  # the map that the person looks at


@dataclass(frozen=True)
class Drawn:
    """A map, what its colours mean, and the value of the lightest."""

    image: Image.Image
    meaning: str
    top: float


@dataclass(frozen=True)
class Heard:
    """The answer so far, and the map of its last word."""

    text: str
    tokens: list[str]
    map: Image.Image | None = None
    done: Answered | None = None


class UIBackend:
    """The service's model, for people who look. `joint`: a joint model of the same VLM, if there is one."""

    def __init__(self, service: Service, joint: JointModel | None = None):
        self.service, self.joint = service, joint
        self.vlm = service.vlm

    @property
    def num_layers(self) -> int:
        return len(self.vlm.text.layers)

    async def answer(self, picture: Image.Image, question: str, joint: bool) -> AsyncIterator[Heard]:
        """The answer, word by word with its map, and at the end the whole explanation."""
        source: Any = self.joint if joint else self.vlm
        count = self.service.settings.default_tokens

        def pieces() -> Iterator[Heard]:
            with source.stream(picture, question, explain=True, max_new_tokens=count) as stream:
                tokens = []
                for step in stream:
                    tokens.append(step.token)
                    grid = step.heatmap().double().numpy()
                    yield Heard(step.text, list(tokens), _over(picture, grid, step.explanation.layout.images[0].box))
                ids = stream.answer.token_ids
            ex = source.explain(picture, question, ids)
            yield Heard(ex.text, ex.tokens, None, Answered(picture, question, ex, joint))

        async for heard in self.service.client.run(pieces):
            yield heard

    async def impaired(
        self, picture: Image.Image, question: str, routes: list[str], first: int, last: int, joint: bool
    ) -> AsyncIterator[str]:
        """The answer without some attention in layers `first` to `last`, as it grows."""
        source: Any = self.joint if joint else self.vlm
        if first > last:
            raise InputError(f"the first layer is at most the last one, got {first} and {last}")
        rules = [Knockout(*ROUTES[route], layers=range(first, last + 1)) for route in routes]
        count = self.service.settings.default_tokens

        def pieces() -> Iterator[str]:
            text = ""
            with source.stream(picture, question, knockout=rules, max_new_tokens=count) as stream:
                for step in stream:
                    text = step.text
                    yield text
            if not text:
                yield "(nothing)"

        async for text in self.service.client.run(pieces):
            yield text

    async def compressed(self, picture: Image.Image, question: str, percent: float) -> tuple[str, str, Image.Image]:
        """The answer from a context that keeps `percent` of the image tokens, what it takes, and the kept patches."""
        ctx: Context = await self.service.kept([picture], percent / 100, tenant="browser")
        count = self.service.settings.default_tokens

        def pieces() -> Iterator[str]:
            with ctx.stream(question, max_new_tokens=count) as stream:
                for step in stream:
                    yield step.text

        text = await self.service.client.last(pieces)
        facts = (
            f"{ctx.settings['kept']} of {len(ctx.layout.positions('image'))} image tokens a layer,"
            f" {ctx.nbytes / 1024:.0f} of {ctx.full_nbytes / 1024:.0f} KiB"
        )
        return text or "(nothing)", facts, draw_kept(replace(ctx, images=(picture,)))

    async def map(self, answered: Answered, shown: Shown) -> Drawn:
        """A token's map."""
        ex = answered.explanation
        answered.shown = shown
        async with answered.guard:
            return await self._scored(lambda: _drawn(ex, shown.token, shown.heads(ex), shown.method), shown.method)

    async def heads(self, answered: Answered, token: int) -> list[tuple[int, int, float, str]]:
        """A token's ten best heads: layer, head, score, and the words that it writes."""
        ex = answered.explanation

        def found() -> list[tuple[int, int, float, str]]:
            rows = []
            for layer, head, score in ex.top_heads(token):
                words = ", ".join(word.strip() for word, _ in ex.project(token, layer, head, k=5))
                rows.append((layer, head, score, words))
            return rows

        async with answered.guard:
            return await self._scored(found, "logprob")

    async def verified(self, answered: Answered, shown: Shown) -> str | None:
        """Whether the word hangs on what this map shows (see `Explanation.verify`); None if another map was chosen
        meanwhile."""
        ex = answered.explanation
        answered.shown = shown

        def check() -> Iterator[str]:
            (found,) = ex.verify(tokens=[shown.token], heads=shown.heads(ex), method=shown.method)
            yield f"{found.verdict}: \u201c{ex.tokens[shown.token].strip()}\u201d, {found}"

        async with answered.guard:
            words = await self.service.client.last(check)
        return words if answered.shown == shown else None

    async def report(self, answered: Answered, kind: str, method: str) -> bytes:
        """The explanation as a file."""
        async with answered.guard:
            return await self._scored(lambda: encoded(answered.explanation, kind, None, method), method)

    async def _scored(self, do: Callable[[], Any], method: str) -> Any:
        """Beside the engine where no pass is needed, else by its thread."""
        if method in LIVE:
            return await self.service.scored(do)
        return await self.service.client.last(lambda: iter([do()]))


def _drawn(ex: Explanation, token: int, heads: Any, method: str) -> Drawn:
    grid, box, boxes = token_map(ex, token, method, heads)
    drawn = _over(ex.images[0], grid, box)
    put_boxes(drawn, boxes, SIDE / max(ex.images[0].size))
    meaning = HEATMAP_METHODS.get(method).meaning
    if method == ALIGNMENT:
        meaning += f"; the detector looks for “{ex.box_weights(token).query}”"
    elif method == "logprob":
        which = f"the {heads} best heads" if isinstance(heads, int) else _named(heads)
        meaning = f"increase of log p(token) by each patch, through {which}"
    return Drawn(drawn, meaning, max(0.0, float(np.max(grid))))


def _named(heads: list[tuple[int, int]]) -> str:
    if len(heads) == 1:
        return f"head {heads[0][1]} of layer {heads[0][0]}"
    return f"all heads of layer {heads[0][0]}"


def _over(picture: Image.Image, grid: np.ndarray, box: tuple[float, float, float, float]) -> Image.Image:
    return overlay(picture, grid, box, max(float(grid.max()), 0.0), SIDE)
