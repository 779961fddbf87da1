"""The rules of a call in the form that the kernel reads.

The sets of tokens that the rules of a layer name divide the positions of the sequence into at most 32 kinds. The kernel
sees the kind of a position as its segment id. A table says which kinds are closed to which.
"""

from __future__ import annotations

import copy
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


class LayerPlan:
    """The rules of some layers, in the form that the kernel reads.

    Args:
        members: Which positions each side of a rule holds, bool [2 R, B, P + 1]: sources and targets in turn. The last
            column stands for every position after it.
        zero_inputs: Of each rule, whether it zeroes inputs.
        images: The position of each image's first token in each sequence, int64 [B, images], or None if the sequences
            have different numbers of images.
        device: The device of the tensors.

    Attributes:
        table: The closed segments, int32 [32].
        images: The segment of each image's first token in each sequence, int64 [B, images], or None.
        zeroed: The segments whose inputs are zeros in layers without attention, bool [kinds], or None.
    """

    def __init__(self, members: Tensor, zero_inputs: Sequence[bool], images: Tensor | None, device: torch.device):
        kinds, ids = torch.unique(members.flatten(1), dim=1, return_inverse=True)
        if kinds.shape[1] > _SEGMENTS:
            raise InputError(
                f"the knockouts' sets cut the sequence into {kinds.shape[1]} kinds of position in one layer, at most"
                f" {_SEGMENTS} are possible; use fewer, or larger, sets"
            )
        self._ids = ids.reshape(members.shape[1:]).to(torch.uint8)
        pairs: set[tuple[int, int]] = set()
        zeroed = torch.zeros(kinds.shape[1], dtype=torch.bool)
        for (source, target), zero in zip(kinds.view(-1, 2, kinds.shape[1]), zero_inputs, strict=True):
            sources, targets = source.nonzero()[:, 0].tolist(), target.nonzero()[:, 0].tolist()
            pairs |= {(s, t) for s in sources for t in targets}
            zeroed |= source.bool() & zero
        self.table = segment_table(sorted(pairs), device)
        self.images = None if images is None else self._ids.long().gather(1, images)
        self.zeroed = zeroed.to(device) if zeroed.any() else None
        self.device = device
        self._made = self._ids[:, :0]
        self._last: tuple[tuple[int, int], Tensor] | None = None
        self._elsewhere: dict[torch.device, LayerPlan] = {}

    def on(self, device: torch.device) -> LayerPlan:
        """Return the same rules for layers that compute on another device."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            other = copy.copy(self)
            other.table, other.device = self.table.to(device), device
            other.zeroed = None if self.zeroed is None else self.zeroed.to(device)
            other._made, other._last = self._ids[:, :0], None  # noqa: SLF001 of the same class
            self._elsewhere[device] = other
        return self._elsewhere[device]

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


class Plan:
    """The rules of one batch of sequences, layer by layer.

    Args:
        rules: The rules.
        layouts: The layout of each sequence, or at least of its prompt.
        num_layers: How many layers the model has.
        padding: The left padding of each sequence in the batch.
        device: The device of the tensors.

    Attributes:
        layers: The rules of each layer, or None for a layer without a rule. Layers with the same rules share them.
    """

    def __init__(
        self,
        rules: Sequence[PlanRule],
        layouts: Sequence[TokenLayout],
        num_layers: int,
        padding: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ):
        padding = [0] * len(layouts) if padding is None else padding
        sets = list(dict.fromkeys(side for rule in rules for side in rule[:2]))
        explicit = [p for one in sets if not isinstance(one, str) for p in _all_positions(one)]
        length = max([layout.prompt_length + pad for layout, pad in zip(layouts, padding, strict=True)])
        length = max([length, *(p + 1 + max(padding) for p in explicit)])
        member = torch.zeros(len(sets), len(layouts), length + 1, dtype=torch.bool)
        for i, one in enumerate(sets):
            for b, (layout, pad) in enumerate(zip(layouts, padding, strict=True)):
                _mark(member[i, b], one, b, layout, pad)
        sides = [(sets.index(rule.source), sets.index(rule.target)) for rule in rules]
        for rule, (source, target) in zip(rules, sides, strict=True):
            _check_apart(member[source] & member[target], rule.source, rule.target, padding)
        images = _first_of_images(layouts, padding)
        active: list[list[int]] = [[] for _ in range(num_layers)]
        for i, rule in enumerate(rules):
            for number in parse_layers(rule.layers, num_layers):
                active[number].append(i)
        made: dict[tuple[int, ...], LayerPlan | None] = {(): None}
        for chosen in map(tuple, active):
            if chosen not in made:
                both = member[[side for i in chosen for side in sides[i]]]
                zero = [rules[i].zero_inputs for i in chosen]
                made[chosen] = LayerPlan(both, zero, images, torch.device(device))
        self.layers = [made[tuple(chosen)] for chosen in active]

    @property
    def zero_layers(self) -> frozenset[int]:
        """The layers with a rule that zeroes inputs."""
        return frozenset(i for i, one in enumerate(self.layers) if one is not None and one.zeroed is not None)

    def unreached(self, others: Mapping[int, str]) -> tuple[int, ...]:
        """Return which of the layers without attention have a rule that leaves their inputs as they are.

        Args:
            others: The classes of these layers by number, see `Findings.others`. Cross-attention to images, which does
                nothing where there is text alone, is not among them: rules reach it.
        """
        layers = [i for i, kind in others.items() if "CrossAttention" not in kind]
        return tuple(i for i in layers if (one := self.layers[i]) is not None and one.zeroed is None)


def plan_of(
    knockouts: Knockout | str | Sequence[Knockout | str] | None,
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


def _first_of_images(layouts: Sequence[TokenLayout], padding: Sequence[int]) -> Tensor | None:
    """Return the position of each image's first token, int64 [B, images], or None if their numbers differ."""
    if len({len(layout.images) for layout in layouts}) != 1:
        return None
    both = zip(layouts, padding, strict=True)
    first = [[int(image.positions[0]) + pad for image in layout.images] for layout, pad in both]
    return torch.tensor(first, dtype=torch.long).reshape(len(layouts), -1)


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
    for name in (part.strip() for part in one.split("+")):
        if name == "generated":
            member[layout.prompt_length + pad :] = True
        elif name in layout.segments or layout.videos:
            member[layout.positions(name) + pad] = True
        else:
            known = ", ".join(layout.segments)
            raise InputError(f"a knockout's segment is one of {known}, or positions; got {name!r}")


def _check_apart(both: Tensor, source, target, padding: Sequence[int]) -> None:
    shared = both.nonzero()
    if len(shared):
        sequence, position = shared[0].tolist()
        raise InputError(
            f"a knockout of {source!r} from {target!r} would block position {position - padding[sequence]} from itself:"
            " give source and target that share no token"
        )
