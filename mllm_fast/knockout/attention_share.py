"""The share of generated tokens' attention by type of token (arXiv 2411.17491, figures 1 and A5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..core.split import Split

TYPES = ("system", "image", "image_separator", "query", "generated")
VIDEO_TYPES = ("system", "image", "image_separator", "timestamp", "query", "generated")
PAPER_TYPES = ("image_block", "text", "generated")  # marks around images, and the system's tokens, belong to the text


def types_of(layouts: Sequence[TokenLayout], what: bool | str) -> tuple[str, ...]:
    """Return the segments that shares are summed up in.

    Args:
        layouts: The layout of each sequence of the batch.
        what: True for all kinds of tokens, "paper" for those of arXiv 2411.17491, "moments" for True's with each image,
            or moment of a video, by itself.

    Raises:
        InputError: `what` is something else, or the sequences have different numbers of images.
    """
    if what not in (True, "paper", "moments"):
        raise InputError(f'attention_share is True, False, "paper" or "moments", got {what!r}')
    if what == "paper":
        return PAPER_TYPES
    types = VIDEO_TYPES if any(layout.videos for layout in layouts) else TYPES
    if what is True:
        return types
    counts = {len(layout.images) for layout in layouts}
    if len(counts) != 1 or counts == {0}:
        raise InputError(
            f'attention_share="moments" needs as many images and moments in every prompt, got {sorted(counts)}'
        )
    each = tuple(f"image:{i}" for i in range(counts.pop()))
    return (types[0], *each, *types[2:])


class AttentionObserver(Protocol):
    """An object that receives the attention mass while the model runs."""

    def wants(self, first_row: int, rows: int) -> bool | Tensor:
        """Return whether the observer wants the mass of a forward pass.

        Args:
            first_row: Position of the first row of the pass.
            rows: How many rows the pass has.

        Returns:
            True for the mass of all rows, a bool [B, rows] for that of some rows, or False.
        """

    def add(self, site: int, mass: Tensor) -> None:
        """Take the mass [B, H, N] of one forward pass at one attention site; see `TextModel`."""

    def add_outside(self, layer: int, mass: Tensor) -> None:
        """Take the mass [B, H] that goes to image keys outside the sequence, in a layer of cross-attention."""


class AttentionShares:
    """Sums the attention mass of every decoding pass by type of token, layer and head.

    Args:
        layouts: The layout of each sequence of the batch.
        padding: The left padding of each sequence.
        num_layers: How many layers the model has.
        site_layers: The layer of each attention site; by default every layer has one.
        types: The segments to sum up, see `types_of`.
        split: What each process holds of a model that is split over processes.
    """

    def __init__(
        self,
        layouts: Sequence[TokenLayout],
        padding: Sequence[int],
        num_layers: int,
        site_layers: Sequence[int] | None = None,
        types: Sequence[str] = TYPES,
        split: Split | None = None,
    ):
        self._split = split
        self._names = tuple(types)
        self._image = next(i for i, name in enumerate(types) if name.startswith("image"))
        self.prompt_length = max(layout.prompt_length + pad for layout, pad in zip(layouts, padding, strict=True))
        made = torch.full((len(layouts), self.prompt_length), self._names.index("generated"))
        self._types = {made.device: made}  # by the device of the layers
        for row, layout, pad in zip(made, layouts, padding, strict=True):
            for i, name in enumerate(self._names[:-1]):
                if name != "timestamp" or layout.videos:
                    row[layout.positions(name) + pad] = i
        self._separators = any(len(layout.separators) for layout in layouts)
        self._num_layers = num_layers
        self._site_layers = tuple(range(num_layers)) if site_layers is None else tuple(site_layers)
        self._outside: dict[int, list[Tensor]] = {}  # of each layer of cross-attention
        self._passes: list[list[Tensor]] = [[] for _ in self._site_layers]

    def wants(self, first_row: int, rows: int) -> bool:
        """Return True for passes that read only generated tokens."""
        return first_row >= self.prompt_length

    def add(self, site: int, mass: Tensor) -> None:
        """Add the mass [B, H, N] of one forward pass."""
        batch, heads, keys = mass.shape
        types = self._types.get(mass.device)
        if types is None:
            types = next(iter(self._types.values())).to(mass.device)
        if types.shape[1] < keys:  # positions after the prompt are generated tokens; add spare ones
            fresh = types.new_full((batch, keys + 64 - types.shape[1]), self._names.index("generated"))
            types = torch.cat([types, fresh], 1)
        self._types[mass.device] = types
        types = types[:, None, :keys].expand(-1, heads, -1)
        self._passes[site].append(mass.new_zeros(batch, heads, len(self._names)).scatter_add_(2, types, mass))

    def add_outside(self, layer: int, mass: Tensor) -> None:
        """Add the mass [B, H] that went to image keys outside the sequence."""
        self._outside.setdefault(layer, []).append(mass)

    def of(self, sequence: int, tokens: int) -> dict[str, Tensor] | None:
        """Return the attention shares of one sequence, a mean over its first `tokens` passes.

        Returns:
            A dict from the type of token to float32 [layers, heads] on the CPU, or None if no generated token was read.
            Layers without attention, and heads that a layer does not have, are 0. "image_separator" is there if a
            prompt has such tokens.
        """
        count = min(tokens, len(self._passes[0]))
        if count == 0:
            return None
        means = [torch.stack([one[sequence] for one in site[:count]]).mean(0).float() for site in self._passes]
        if self._split is not None:
            means = list(self._split.gather(torch.stack(means), 1))
        means = [one.cpu() for one in means]
        total = torch.zeros(self._num_layers, max(map(len, means)), len(self._names))
        for layer, mean in zip(self._site_layers, means, strict=True):
            total[layer, : len(mean)] = mean
        for layer, passes in self._outside.items():
            outside = torch.stack([one[sequence] for one in passes[:count]]).mean(0).float().cpu()
            total[layer, : len(outside), self._image] = outside
        names = enumerate(self._names)
        return {name: total[..., i] for i, name in names if name != "image_separator" or self._separators}
