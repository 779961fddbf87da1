"""A decoding step over tensors that stay where they are.

Keys and values lie in arrays of a fixed size, and the length, the position and the rules of the knockouts in tensors on
the device: a step waits for nothing, has no shape that depends on data, and writes only where it wrote before. On a GPU
it is captured as a CUDA graph once and replayed for every token; elsewhere the same functions are called. The attention
kernels see the whole arrays, with the keys that a row does not see in a segment that is closed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..core.errors import InputError
from ..kernels import segment_table, wide_type
from ..knockout.plan import Plan
from ..models.offload import device_of_part
from ..models.text_model import TextModel
from .attention import Scoring, attend
from .cuda_graph import Replayed
from .hooks import recording
from .record import Recording
from .row_mask import RowMask
from .sampling import next_tokens, stateless
from .trace import Trace, trace_of

_SEEN, _UNSEEN, _ROW = 0, 1, 2  # segments of the keys, as a row of a step sees them
_SEGMENTS = 32


class StepScores(NamedTuple):
    """The scores of a step's token.

    Attributes:
        heads: Of every head's write, [S, H].
        best: The best heads, as numbers site * H + head, int64 [k].
        positions: Of the best heads' writes from every position, [k, N].
    """

    heads: Tensor
    best: Tensor
    positions: Tensor


Score = Callable[[Trace, Tensor], StepScores]  # of a trace of one row, and its token [1]


class StepResult(NamedTuple):
    """What a step gives.

    Attributes:
        token: The next token.
        log_prob: Its log-probability, before any sampling settings.
        scores: Its scores, on the CPU over the positions that were read, or None.
        trace: Makes the trace of its row, or None.
    """

    token: int
    log_prob: float
    scores: StepScores | None
    trace: Callable[[], Trace] | None


def check_static(text: TextModel) -> None:
    """Raise InputError if a model's layers cannot be stepped over fixed arrays."""
    others = text.findings.others
    if text.split is not None or len({device_of_part(layer) for layer in text.layers}) > 1:
        raise InputError("static=True takes a model on one device, this one lies on several devices: leave static out")
    if others:
        raise InputError(
            f"static=True: {len(others)} layers of this model are of the class {next(iter(others.values()))}, which"
            " keep a state of their own; leave static out"
        )
    if text.shares_keys:
        raise InputError("static=True: layers of this model share the keys of others; leave static out")


class StaticStep:
    """One sequence, decoded token by token over fixed arrays.

    Args:
        text: The text part of a model.
        keys, values: Keys and values of the prompt, [Hkv, N, D] a site.
        position: Position of the last token that was read, for the rotary embedding.
        room: The most positions of the sequence.
        processors, sample: As in `sampling.next_tokens`.
        score: What scores a token in the step, or None.
        backend: The backend of the kernels.
    """

    def __init__(  # noqa: PLR0913
        self,
        text: TextModel,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        position: int,
        room: int,
        processors: Any = None,
        sample: bool = False,
        score: Score | None = None,
        backend: str = "auto",
    ):
        check_static(text)
        self._text, self._score, self._backend = text, score, backend
        self._processors, self._sample = processors, sample
        device, count = keys[0].device, keys[0].shape[1]
        room += 1  # the last key stands for the row itself, whose segment says what is closed to it
        self.keys, self.values = ([_roomy(one, room) for one in many] for many in (keys, values))
        number = lambda value: torch.full((1,), value, dtype=torch.int64, device=device)  # noqa: E731
        self.token, self.length, self.position = number(0), number(count), number(position)
        self._count = count
        self._plan: Plan | None = None
        self._place = torch.arange(room, device=device)
        self._ids = torch.zeros(len(text.layers), room, dtype=torch.uint8, device=device)
        self._tables = torch.zeros(len(text.layers), _SEGMENTS, dtype=torch.int32, device=device)
        windows = [room if site.window is None else site.window for site in text.sites]
        self._windows = torch.tensor(windows, device=device)[:, None]
        self._layers = torch.tensor(text.site_layers, device=device)
        self._table = segment_table([(_UNSEEN, _ROW), (_ROW, _ROW)], device)
        self._mask = RowMask.of(causal_mask_function, None, 1, room, room - 1, 0, torch.device(device))
        self._ready = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # so that transformers makes no mask
        self._record = Recording(0, 0, 0, device)
        self._seen = self._segments = self._ids
        # processors of the scores alone are a part of the step, others are called between its parts
        self._whole = all(map(stateless, processors or ()))
        moving = [self.token, self.length, self.position]
        reading = Replayed(self._all if self._whole else self._read, moving, self._attached)
        self._parts = [reading, Replayed(self._explained, moving, nullcontext)]

    def set_plan(self, plan: Plan | None) -> None:
        """Set the knockouts of the next steps."""
        if plan is self._plan:
            return
        self._plan = plan
        self._tables.zero_()
        for layer, rules in enumerate([] if plan is None else plan.layers):
            if rules is not None:
                self._ids[layer].copy_(rules.segments(1, self._ids.shape[1])[0])
                self._tables[layer].copy_(rules.table)

    def step(self, ids: Tensor) -> StepResult:
        """Read the last token of a sequence, int64 [1, N], and choose the next one."""
        if self._count + 2 > len(self._place):
            raise InputError(f"the arrays of this stream hold {len(self._place) - 1} positions, and all are taken")
        self.token.copy_(ids[0, -1:])
        if self._whole:
            found = self._parts[0]()
        else:
            self.token.copy_(self._choose(self._parts[0](), ids))
            found = self._parts[1]()
        self._count += 1
        packed = found.cpu()  # the only copy to the host
        token, log_prob = packed[:2].tolist()
        if self._score is None:
            return StepResult(int(token), log_prob, None, None)
        return StepResult(int(token), log_prob, self._unpacked(packed[2:]), self._kept())

    # what follows is captured: it reads and writes tensors on the device alone

    def _all(self) -> Tensor:
        self.token.copy_(self._choose(self._read(), None))
        return self._explained()

    def _read(self) -> Tensor:
        """Read the token, and return the logits after it, float32 [1, V]."""
        self.length.add_(1)
        self.position.add_(1)
        self._look()
        self._record.cut()
        hidden = self._text.decoder(
            input_ids=self.token[None],
            attention_mask=self._ready,
            position_ids=self.position[None],
            use_cache=False,
        ).last_hidden_state[0]
        self._logits = self._text.logits(hidden).float()
        return self._logits

    def _look(self) -> None:
        """Note which keys the row sees at each site."""
        at = self.length - 1
        row = self._ids.index_select(1, at).long()
        closed = (self._tables.gather(1, row) >> self._ids.int() & 1).bool().index_select(0, self._layers)
        seen = (self._place <= at) & (self._place > at - self._windows) & ~closed
        self._seen = seen
        self._segments = torch.where(seen, _SEEN, _UNSEEN).to(torch.uint8)
        self._segments[:, -1:].fill_(_ROW)

    def _attend(self, site: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        keys, values, at = self.keys[site], self.values[site], self.length - 1
        keys.index_copy_(2, at, key.to(keys.dtype))
        values.index_copy_(2, at, value.to(values.dtype))
        closed = self._segments[site : site + 1], self._table
        return attend(query.to(keys.dtype), keys, values, self._mask, scoring, closed, False, self._backend).output

    def _choose(self, logits: Tensor, ids: Tensor | None) -> Tensor:
        # processors may write into what they are given
        return next_tokens(logits.clone(), ids, self._processors, self._sample)

    def _explained(self) -> Tensor:
        """Return the token, its log-probability and its scores as one array."""
        log_prob = self._logits.gather(1, self.token[None])[0] - self._logits.logsumexp(-1)
        found = [self.token, log_prob]
        if self._score is not None:
            self._trace = self._traced(len(self._place))
            found += self._score(self._trace, self.token)
        kind = wide_type(log_prob.dtype) if self._score is None else wide_type(found[2].dtype)
        return torch.cat([one.flatten().to(kind) for one in found])

    def _traced(self, length: int) -> Trace:
        keys, values = ([one[0, :, :length] for one in many] for many in (self.keys, self.values))
        made = trace_of(self._record, keys, values, range(length - 1, length))
        return replace(made, seen=tuple(self._seen[:, None]))

    # until here

    @contextmanager
    def _attached(self) -> Iterator[None]:
        rows = 0 if self._score is None else 1
        with recording(self._text, rows, backend=self._backend, attention_fn=self._attend) as self._record:
            yield

    def _unpacked(self, packed: Tensor) -> StepScores:
        sites, heads = len(self._text.sites), self._text.num_heads
        each = sites * heads
        count = (len(packed) - each) // (1 + len(self._place))
        scores, best, positions = packed.split([each, count, count * len(self._place)])
        positions = positions.unflatten(0, (count, -1))[:, : self._count]
        return StepScores(scores.unflatten(0, (sites, heads)), best.long(), positions)

    def _kept(self) -> Callable[[], Trace]:
        """Return what makes the trace of the last row, of which the next step leaves nothing but keys and values."""
        made, count = self._trace, self._count
        assert made is not None
        rows = ("residual", "query", "output", "final")
        kept: dict[str, Any] = {name: getattr(made, name).clone() for name in rows}
        kept["gate"] = tuple(None if one is None else one.clone() for one in made.gate)
        kept["write_scale"] = None if made.write_scale is None else made.write_scale.clone()
        kept["seen"] = tuple(self._seen[:, None, :count].clone().unbind())
        kept |= {name: tuple(one[:, :count] for one in getattr(made, name)) for name in ("keys", "values")}
        return lambda: replace(made, rows=range(count - 1, count), **kept)


def _roomy(held: Tensor, room: int) -> Tensor:
    """Return keys or values [Hkv, N, D] in an array [1, Hkv, room, D]."""
    wide = held.new_zeros(1, len(held), room, held.shape[2])
    wide[0, :, : held.shape[1]] = held
    return wide
