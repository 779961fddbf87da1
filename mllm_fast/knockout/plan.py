"""The rules of a call in the form that the kernel reads.

The sets of tokens that the rules name divide the positions of the sequence into at most 32 kinds. The kernel sees the
kind of a position as its segment id. Each layer has a table that says which kinds are closed to which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..kernels import segment_table
from .rule import Knockout, Layers, Tokens, as_rules, parse_layers

_SEGMENTS = 32
_ROOM = 256  # spare ids after the sequence, so that decoding rarely has to make new ones


@dataclass(frozen=True)
class PerSequencePositions:
    """Positions that differ between the sequences of a batch, for use as a rule's source or target."""

    positions: tuple[tuple[int, ...], ...]


class PlanRule(NamedTuple):
    """A `Knockout` whose sets of tokens may differ between the sequences of a batch."""

    source: Tokens | PerSequencePositions
    target: Tokens | PerSequencePositions
    layers: Layers
    zero_inputs: bool = False


class Plan:
    """The rules of one batch of sequences, in the form that the kernel reads.

    Args:
        rules: The rules.
        layouts: The layout of each sequence, or at least of its prompt.
        num_layers: How many layers the model has.
        padding: The left padding of each sequence in the batch.
        device: The device of the tensors.

    Attributes:
        tables: The closed segments of each layer, int32 [32], or None for a layer without a rule.
        images: The segment of each image's first token in each sequence, int64 [B, images], or None if sequences have
            different numbers of images.
        zeroed: The segments whose inputs to each layer are zeros if it has no attention, bool [kinds], or None.
    """

    def __init__(
        self,
        rules: Sequence[PlanRule],
        layouts: Sequence[TokenLayout],
        num_layers: int,
        padding: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        padding = [0] * len(layouts) if padding is None else padding
        sets = list(dict.fromkeys(side for rule in rules for side in rule[:2]))
        explicit = [p for one in sets if not isinstance(one, str) for p in _all_positions(one)]
        length = max([layout.prompt_length + pad for layout, pad in zip(layouts, padding, strict=True)])
        length = max([length, *(p + 1 + max(padding) for p in explicit)])
        # the last column stands for every position after it
        member = torch.zeros(len(sets), len(layouts), length + 1, dtype=torch.bool)
        for i, one in enumerate(sets):
            for b, (layout, pad) in enumerate(zip(layouts, padding, strict=True)):
                _mark(member[i, b], one, b, layout, pad)
        for source, target, *_ in rules:
            _check_apart(member[sets.index(source)] & member[sets.index(target)], source, target, padding)
        kinds, ids = torch.unique(member.flatten(1), dim=1, return_inverse=True)
        if kinds.shape[1] > _SEGMENTS:
            raise InputError(
                f"the knockouts' sets cut the sequence into {kinds.shape[1]} kinds of position, at most {_SEGMENTS} are"
                " possible; use fewer, or larger, sets"
            )
        self._ids = ids.reshape(len(layouts), length + 1).to(torch.uint8)
        self.images = self._of_images(layouts, padding)
        closed: list[list[tuple[int, int]]] = [[] for _ in range(num_layers)]
        zeroed = torch.zeros(num_layers, kinds.shape[1], dtype=torch.bool)
        for source, target, layers, zero_inputs in rules:
            sources, targets = kinds[sets.index(source)].nonzero()[:, 0], kinds[sets.index(target)].nonzero()[:, 0]
            pairs = [(s, t) for s in sources.tolist() for t in targets.tolist()]
            for layer in parse_layers(layers, num_layers):
                closed[layer] += pairs
                zeroed[layer, sources] |= zero_inputs
        made: dict[tuple, Tensor | None] = {(): None}
        for pairs in closed:
            key = tuple(sorted(set(pairs)))
            if key not in made:
                made[key] = segment_table(key, self.device)
        self.tables = [made[tuple(sorted(set(pairs)))] for pairs in closed]
        self.zeroed = [one.to(self.device) if one.any() else None for one in zeroed]
        self._made = self._ids[:, :0]
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def _of_images(self, layouts: Sequence[TokenLayout], padding: Sequence[int]) -> Tensor | None:
        if len({len(layout.images) for layout in layouts}) != 1:
            return None
        first = [
            [int(image.positions[0]) + pad for image in layout.images]
            for layout, pad in zip(layouts, padding, strict=True)
        ]
        return self._ids.long().gather(1, torch.tensor(first, dtype=torch.long).reshape(len(layouts), -1))

    def segments(self, batch: int, keys: int) -> Tensor:
        """Return the segment ids of the first `keys` positions, uint8 [batch or 1, keys].

        A batch that is a multiple of the plan's (beams, several answers) repeats each sequence.
        """
        if self._last is not None and self._last[0] == (batch, keys):
            return self._last[1]
        if self._made.shape[1] < keys or len(self._made) not in (1, batch):
            ids, after = self._ids[:, :-1], self._ids[:, -1:]
            room = max(keys + _ROOM, ids.shape[1]) - ids.shape[1]
            ids = torch.cat([ids, after.expand(-1, room)], 1)
            if len(ids) > 1:
                ids = ids.repeat_interleave(batch // len(ids), 0)
            self._made = ids.to(self.device)
        self._last = (batch, keys), self._made[:, :keys]
        return self._last[1]

    @property
    def zero_layers(self) -> frozenset[int]:
        """The layers with a rule that zeroes inputs."""
        return frozenset(i for i, one in enumerate(self.zeroed) if one is not None)

    def unreached(self, others: Mapping[int, str]) -> tuple[int, ...]:
        """Return which of the layers without attention have a rule that leaves their inputs as they are.

        Args:
            others: The classes of these layers by number, see `Findings.others`. Cross-attention to images, which does
                nothing where there is text alone, is not among them: rules reach it.
        """
        layers = [i for i, kind in others.items() if "CrossAttention" not in kind]
        return tuple(i for i in layers if self.tables[i] is not None and self.zeroed[i] is None)


def plan_of(
    knockouts: Knockout | Sequence[Knockout] | None,
    layouts: Sequence[TokenLayout],
    num_layers: int,
    padding: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    window: int | None = None,
) -> Plan | None:
    """Return the plan of some knockouts, or None if there is none.

    Args:
        knockouts: One knockout, several, or None.
        layouts: The layout of each sequence, or at least of its prompt.
        num_layers: How many layers the model has.
        padding: The left padding of each sequence in the batch.
        device: The device of the tensors.
        window: How many positions the model has, or None for no limit.

    Raises:
        InputError: A segment is unknown, the model lacks a layer or a position, or a rule blocks a token from itself.
    """
    rules = as_rules(knockouts)
    if not rules:
        return None
    for rule in rules:
        furthest = max(
            (max(one, default=0) for one in (rule.source, rule.target) if not isinstance(one, str)), default=0
        )
        if window is not None and furthest >= window:
            raise InputError(f"positions of a knockout are 0 to {window - 1}, the model's window; got {furthest}")
    return Plan(plan_rules(rules), layouts, num_layers, padding, device)


def plan_rules(rules: Iterable[Knockout]) -> list[PlanRule]:
    """Return knockouts as the rules of a plan."""
    return [PlanRule(rule.source, rule.target, rule.layers, rule.zero_inputs) for rule in rules]


def _all_positions(one: Tokens | PerSequencePositions) -> Iterable[int]:
    if isinstance(one, PerSequencePositions):
        return [p for positions in one.positions for p in positions]
    return () if isinstance(one, str) else one


def _mark(member: Tensor, one: Tokens | PerSequencePositions, sequence: int, layout: TokenLayout, pad: int) -> None:
    """Mark the positions of a set of tokens in one sequence, in `member` [length + 1]."""
    if not isinstance(one, str):
        positions = one.positions[sequence] if isinstance(one, PerSequencePositions) else one
        for p in positions:
            if p < 0:
                raise InputError(f"positions of a knockout are 0 or more, got {p}")
            member[p + pad] = True
        return
    segments = layout.segments
    for name in (part.strip() for part in one.split("+")):
        if name not in segments:
            raise InputError(f"a knockout's segment is one of {', '.join(segments)}, or positions; got {name!r}")
        if name == "generated":
            member[layout.prompt_length + pad :] = True
        else:
            member[segments[name] + pad] = True


def _check_apart(both: Tensor, source, target, padding: Sequence[int]) -> None:
    shared = both.nonzero()
    if len(shared):
        sequence, position = shared[0].tolist()
        raise InputError(
            f"a knockout of {source!r} from {target!r} would block position {position - padding[sequence]} from itself:"
            " give source and target that share no token"
        )
