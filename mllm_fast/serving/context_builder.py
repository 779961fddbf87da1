"""Build a context inside the engine.

A prefill reads the image. The description, if the score needs one, is then decoded with the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..context.compress import ContextSizes, ScoredPrefill, context_sizes, whole_context
from ..context.registry import PRUNING_SCORES
from ..context.scores import AttendedTokens, count_of
from ..core.errors import InputError
from ..runtime.batch import Row
from ..runtime.prefill import Prefill, PrefillInPieces, check_batches
from ..runtime.sampling import Sampler, SamplerCache, Sampling
from .requests import ContextSpec, Generation

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM


class ContextBuilder:
    """Builds one context.

    Args:
        vlm: The model.
        key: The context's key in the store.
        spec: How the context is made.
        samplers: Makes the sampler of the description.

    Attributes:
        waiting: The generations that wait for the context.
        owed: The generations that are answered from the whole prefix as soon as the batch has room.
        said: The token ids of the description so far.
        row: The builder's row in the batch, or None.
        running: Whether the image was read.
        done: Whether the description is complete.
        announced: The sizes of the context that will be made; None before the image was read. Questions are answered
            from the whole prefix until then.
        asked: How many questions were answered so.
        position: Position of the first token after the prefix, for the rotary embedding.
    """

    def __init__(self, vlm: VLM, key: str, spec: ContextSpec, samplers: SamplerCache):
        self.vlm, self.key, self.spec = vlm, key, spec
        self.waiting: list[Generation] = []
        self.owed: list[Generation] = []
        self.said: list[int] = []
        self.row: Row | None = None
        self.running = self.done = False
        self.announced: ContextSizes | None = None
        self.asked = self.position = 0
        self._first: Prefill | None = None
        self._mass: Tensor | None = None
        self._observes = ""
        self._watcher: AttendedTokens | None = None
        self._choosers = samplers
        self._chooser: Sampler | None = None
        self._stop = vlm.settings().end_ids

    @property
    def plain(self) -> bool:
        """Whether the description takes the most likely token at each step (greedy decoding)."""
        return self._chooser is not None and self._chooser.plain

    @property
    def sequence(self) -> list[int]:
        """The token ids of the prefix."""
        return self._first.input_ids.tolist()  # type: ignore[union-attr]

    def choose(self, logits: Tensor) -> int:
        """Return the next token of the description."""
        return self._chooser.choose(logits)  # type: ignore[union-attr]

    def drop_cancelled(self, dropped: Callable[[Generation], bool]) -> None:
        """Remove the generations that no longer wait."""
        self.waiting = [one for one in self.waiting if not dropped(one)]
        self.owed = [one for one in self.owed if not dropped(one)]

    def begin(self) -> PrefillInPieces:
        """Return the prefill, which is to be read."""
        self.running = True
        vlm, spec = self.vlm, self.spec
        check_batches(vlm.text)
        image = len(spec.layout.positions("image"))
        # a prefix is held as it is, and where everything is kept its scores do not matter
        if not spec.whole and count_of(spec.keep, spec.layout, spec.budget) < image:
            self._observes = PRUNING_SCORES.get(spec.score).observes
        if self._observes == "query":
            self._watcher = AttendedTokens(spec.layout, "query", len(vlm.text.sites), vlm.text.split)
        return PrefillInPieces(vlm, spec.inputs, spec.layout, self._watcher)

    def begun(self, first: Prefill) -> None:
        """Take the prefill's result, and the first token of the description.

        `done` is set if the context needs no more tokens.

        Raises:
            InputError: The score needs a description, and no token of one can be read.
        """
        self._first, spec = first, self.spec
        if self._observes != "generated":
            self._mass = None if self._watcher is None else self._watcher.mean()
            self.done = True
            return
        self._chooser = self._choosers.make(first.input_ids.tolist(), Sampling())
        if not self.take(self._chooser.choose(first.logits)):
            raise InputError(
                f"no token of a reply to {spec.prompt!r} was read, so there are no rows to score by: give another"
                " prompt, more tokens, or score='query'"
            )

    def joined(self, row: Row) -> None:
        """Continue as a row of the batch, which now stores the keys and values."""
        assert self._first is not None
        self.row, self.position = row, self._first.position
        self.announced = context_sizes(self._first, self.spec.layout, self.spec.keep, self.spec.budget)
        self._first = replace(self._first, keys=(), values=())  # type: ignore[type-var]

    def take(self, token: int) -> bool:
        """Add a token to the description, and return whether the description goes on."""
        self.said.append(token)
        self._chooser.ids.append(token)  # type: ignore[union-attr]
        self.done = token in self._stop or len(self.said) >= self.spec.max_tokens
        return not self.done

    def context(self, prefix: tuple[Sequence[Tensor], Sequence[Tensor]] | None) -> Context:
        """Return the finished context.

        Args:
            prefix: The keys and values of the whole prefix, from the batch; None takes those of the prefill.
        """
        first, spec = self._first, self.spec
        assert first is not None
        if spec.whole:
            return whole_context(self.vlm, first, spec.layout)
        keys, values = (first.keys, first.values) if prefix is None else prefix
        masses = {}
        if self.row is not None and self.row.mass is not None:
            split, mass = self.vlm.text.split, self.row.mass / self.row.length
            masses["generated"] = (mass if split is None else split.mean(mass)).cpu()
        elif self._mass is not None:
            masses["query"] = self._mass
        words = self.vlm.processor.tokenizer.decode(self.said, skip_special_tokens=True).strip()
        prefill = ScoredPrefill(
            vlm=self.vlm,
            layout=spec.layout,
            input_ids=first.input_ids,
            keys=tuple(keys),
            values=tuple(values),
            masses=masses,
            position=first.position,
            prompt=spec.prompt,
            description=words,
            images=(),
            peak_nbytes=sum(tensor.nbytes for tensor in (*keys, *values)),
            first_token=self.said[0] if self.said else int(first.logits.argmax()),
        )
        return prefill.context(spec.keep, spec.score, budget=spec.budget)


class ContextBuilders(dict[str, ContextBuilder]):
    """The contexts that are being made, by their keys.

    Args:
        vlm: The model.
        samplers: Makes the samplers of descriptions.
        held, at_once: See `Engine`.
    """

    def __init__(self, vlm: VLM, samplers: SamplerCache, held: Callable[[str], Context | None], at_once: bool):
        super().__init__()
        self.at_once = at_once
        self._vlm, self._samplers, self._held = vlm, samplers, held

    def announced(self, key: str) -> bool:
        """Return whether a context is being made, and was named in an answer."""
        builder = self.get(key)
        return builder is not None and builder.asked > 0

    def waits(self, wanted: Generation, divides: bool) -> bool:
        """Find the context of a question, or let the question wait for it; return whether it waits.

        Args:
            wanted: The question.
            divides: Whether a prompt can be read in two parts.
        """
        if wanted.spec is not None and wanted.spec.whole and not divides:
            wanted.spec, wanted.key = None, ""
        if wanted.spec is None or wanted.context is not None:
            return False
        wanted.context = self._held(wanted.key)  # it may have been built since the request was prepared
        wanted.cached = wanted.context is not None
        if wanted.context is not None:
            return False
        builder = self.get(wanted.key)
        if builder is None:
            builder = self[wanted.key] = ContextBuilder(self._vlm, wanted.key, wanted.spec, self._samplers)
        if builder.announced is None or not wanted.max_tokens or not self.at_once:
            builder.waiting.append(wanted)
            return True
        if wanted not in builder.owed:
            builder.owed.append(wanted)
        return False
