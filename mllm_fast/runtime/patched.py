"""The patched model inside a `with` block, for code that runs the model itself.

This is the caller's own `generate`, a pipeline or an evaluation harness. The segments of a call are read from its input
ids. `generate` is given the prompt. A direct call of the model is a prompt if its cache is empty. If its cache was
filled inside the block, it is one generated token a sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..knockout.plan import LayerPlan, Plan
from ..knockout.rule import Knockout, parse_layers
from . import compiled
from .hooks import recording
from .kv_cache import CACHE, cache_of
from .model_runner import ModelRunner
from .record import Recording


@dataclass
class PatchedCall:
    """One prompt, or a batch of prompts, and what was generated from it.

    Attributes:
        input_ids: Token ids of the prompts, int64 [B, N].
        inputs: All keyword arguments of the call.
        layouts: The layout of each prompt, without its padding.
        padding: How many padding tokens precede each prompt.
        plan: The plan of the knockouts, or None.
        record: The recorded rows.
        cache: The KV cache.
        sequences: The sequences that `generate` returned, [B', N'], or None.
        seen_ids: Input ids of the last pass without a cache.
    """

    input_ids: Tensor
    inputs: dict[str, Any]
    layouts: tuple[TokenLayout, ...]
    padding: tuple[int, ...]
    plan: Plan | None
    record: Recording
    cache: Any = None
    sequences: Tensor | None = None
    seen_ids: Tensor | None = field(default=None, repr=False)  # of the last pass without a KV cache


class _Patch:
    """Follows the calls of one model. In `recording` it takes the place of a `Plan`, that of the current call."""

    def __init__(self, runner: ModelRunner, rules: Sequence[Knockout], calls: list[PatchedCall]):
        self.runner = runner
        self.rules = tuple(rules)
        self.calls = calls
        self.original = runner.model.generate
        self.record: Recording | None = None
        self._current: PatchedCall | None = None
        self._by_cache: weakref.WeakKeyDictionary[Any, PatchedCall] = weakref.WeakKeyDictionary()
        self._uncached: PatchedCall | None = None
        self.model: Any = runner.model
        self.hooks: Any = None  # which call this
        self._compiled: tuple[PatchedCall, int] | None = None  # of a compiled model: the call, and how much was read

    @property
    def layers(self) -> list[LayerPlan | None]:
        """The rules of each layer in the current call; see `Plan`."""
        return self._plan().layers

    @property
    def zero_layers(self) -> frozenset[int]:
        """The layers with a rule that zeroes inputs; see `Plan`."""
        count = len(self.runner.text.layers)
        return frozenset().union(*(parse_layers(rule.layers, count) for rule in self.rules if rule.zero_inputs))

    def _plan(self) -> Plan:
        if self._current is None or self._current.plan is None:
            raise InputError(
                "a part of the model was called by itself, so its input ids are not known: inside `with"
                " vlm.knocked_out(...)` call the model, or its generate"
            )
        return self._current.plan

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's `generate`, and note its prompt."""
        given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self._current = self._begin(given, kwargs)
        self.hooks.generating = True
        try:
            output = self.original(*args, **kwargs)
            call = self._current
            call.sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
            return output
        finally:
            self.hooks.generating, self._current = False, None
            self.finish()

    def before(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the prompt that a call of the model belongs to, before the call runs."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = compiled.cache_given(kwargs)
        if cache is None or not cache.get_seq_length():
            self._current = (None if cache is not None else self._goes_on(ids)) or self._begin(ids, kwargs)
            return
        call = self._by_cache.get(cache)
        if call is None:
            raise InputError(
                "the cache was filled outside this block, or copied, so what lies in it is not known: make it inside"
            )
        self._check_rows(call, ids)
        self._current = call

    def begin_in_graph(self, ids: Tensor, read: int, cached: bool, inputs: dict[str, Any]) -> None:
        """Find the prompt of a call of a compiled model; `read` positions were read into its cache before."""
        if not read:
            before = self._current if self.hooks.last_cache is None and not cached else None
            if before is not None and before.seen_ids is not None:
                self._uncached = before
            self._current = (None if cached else self._goes_on(ids)) or self._begin(ids, inputs)
            self._current.seen_ids = ids
            self._compiled = self._current, ids.shape[1]
            return
        call, known = self._compiled or (None, 0)
        if call is None or known != read:
            raise InputError(
                f"the cache holds {read} positions, and the last call of the compiled model inside this block read"
                f" {known}: make the cache inside the block, and read one sequence or batch at a time"
            )
        self._check_rows(call, ids)
        self.finish()
        self._current, self._compiled = call, (call, read + 1)

    @staticmethod
    def _check_rows(call: PatchedCall, ids: Any) -> None:
        if not isinstance(ids, Tensor) or ids.shape[1] != 1:
            raise InputError(
                "after its first pass a cache takes one token a sequence here: of several it is not known whether they"
                " are prompt or answer; use the model's generate, or read the whole prompt in one pass"
            )
        if len(ids) % len(call.layouts):
            raise InputError(
                f"the cache holds {len(call.layouts)} prompts, the call {len(ids)} sequences, so it is not known which"
                " is whose: keep all sequences of a batch"
            )

    def finish(self) -> None:
        """Give the last call of a compiled model the cache that its last pass filled."""
        if self.calls and self.calls[-1].cache is None:
            self.calls[-1].cache = self.hooks.last_cache

    def after(self, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Note the cache of a call of the model after it ran."""
        call = self._current
        if call is None:
            return
        cache = cache_of(output) if CACHE in output else None
        if cache is not None:
            call.cache = cache
            self._by_cache[cache] = call
        elif not self.hooks.generating:
            call.seen_ids = kwargs.get("input_ids", args[0] if args else None)
            self._uncached = call
        if not self.hooks.generating:
            self._current = None

    def _goes_on(self, ids: Any) -> PatchedCall | None:
        """Return the call that a pass without a cache continues by one token a sequence, or None."""
        call = self._uncached
        before = None if call is None else call.seen_ids
        if not isinstance(ids, Tensor) or before is None or ids.shape != (len(before), before.shape[1] + 1):
            return None
        return call if torch.equal(ids[:, :-1], before) else None

    def _begin(self, ids: Any, inputs: dict[str, Any]) -> PatchedCall:
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise _no_ids(ids, inputs)
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        elif not isinstance(mask, Tensor) or mask.shape != ids.shape:
            got = str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"attention_mask is [sequences, tokens] as input_ids, {list(ids.shape)}, in the first call of a prompt"
                f" inside this block; got {got}: where padding ends is read from it"
            )
        rows, padding = [], []
        for row, seen in zip(ids.cpu(), mask.bool().cpu(), strict=True):
            where = seen.nonzero()[:, 0]
            first, stop = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, len(row))
            rows.append(row[first:stop])
            padding.append(first)
        layouts = self._layouts(rows, inputs)
        plan = self.runner.plan(self.rules, layouts, padding) if self.rules else None
        assert self.record is not None
        past = self.record.cut()
        for call in self.calls:
            call.record = past
        call = PatchedCall(ids, dict(inputs), tuple(layouts), tuple(padding), plan, self.record)
        self.calls[:] = [call]  # only the last call: the caches of all calls would fill the memory
        return call

    def _layouts(self, rows: Sequence[Tensor], inputs: dict[str, Any]) -> list[TokenLayout]:
        """Return the layouts of a call's prompts, each without padding."""
        tokens = self.runner.prompts.image_tokens
        counts = [int((row == tokens.image).sum()) for row in rows]
        lengths = self.runner.adapter.image_lengths(self.runner.processor, inputs, sum(counts))
        if lengths is None:
            return [TokenLayout.from_prompt_ids(row, tokens.both, None, tokens.separators) for row in rows]
        layouts, left = [], list(lengths)
        for row, count in zip(rows, counts, strict=True):
            mine: list[int] = []
            while sum(mine) < count and left:
                mine.append(left.pop(0))
            if sum(mine) != count:
                raise InputError(
                    f"a prompt holds {count} image tokens, which its images' {lengths} tokens do not add up to: give"
                    " the model all images of the prompts"
                )
            layouts.append(TokenLayout.from_prompt_ids(row, tokens.both, mine, tokens.separators))
        return layouts


def _no_ids(ids: Any, inputs: dict[str, Any]) -> InputError:
    got = "inputs_embeds" if inputs.get("inputs_embeds") is not None else type(ids).__name__
    return InputError(
        f"the model is called with input_ids, int64 [sequences, tokens], inside this block; got {got}: which tokens are"
        " the image's is read from the ids"
    )


@contextmanager
def patched(runner: ModelRunner, rules: Sequence[Knockout], rows: int = 0) -> Iterator[list[PatchedCall]]:
    """Run every call of the model inside the block under these knockouts, and record the last `rows` rows of each pass.

    Other threads wait for the model. When the block ends, also by an exception, the model is restored.

    Yields:
        A list that holds the last call, from the moment it begins.
    """
    calls: list[PatchedCall] = []
    model: Any = runner.model
    patch = _Patch(runner, rules, calls)
    plan: Any = patch if rules else None
    with recording(runner.text, rows, plan, backend=runner.backend, follower=patch) as patch.record:
        before = vars(model).get("generate")
        model.generate = patch.generate
        try:
            yield calls
        finally:
            if before is None:
                del model.generate
            else:
                model.generate = before
            patch.finish()
