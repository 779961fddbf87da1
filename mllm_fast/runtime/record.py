"""What is recorded of forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..kernels.decoder_layers import DecoderOutput
from .attention import Closed, Scoring, seen_by
from .row_mask import RowMask


@dataclass
class Recording:
    """The last `rows` rows of each forward pass, [B, rows, ...] a pass.

    Attributes:
        rows: How many rows are recorded of each pass.
        num_layers: How many layers the model has.
        num_sites: How many of them have attention.
        device: Where the recorded rows are stored.
        residual: Residual input of each layer, one list of passes a layer.
        query: Rotated queries, [B, rows, H, D], one list of passes a site.
        output: What the heads give to the output projection, [B, rows, H, Dv], one list of passes a site.
        gate: The factor of the heads' output before the output projection, in the shape of `output`, one list of passes
            a site; empty for a site without a gate.
        write_scale: The scale of the norm behind the output projection, [B, rows], one list of passes a site; empty for
            a site without such a norm.
        attended: The keys and values of the last pass, [B, Hkv, N, D], of each site whose cache holds something else.
        final: Inputs of the final norm, one a pass.
        seen: Which keys the rows see, one list of passes a site: bool [B or 1, rows, N], or None for plain causal
            attention.
        scoring: How scores become attention weights, one a site.
        last: Position of the last row of each pass, or None if the caller's own mask does not tell it.
        embeds: Input embeddings of all rows of each pass, [B, R, d].
        positions: Position ids of all rows of each pass, [..., B, R], or None.
        others: Further arguments that the decoder got in each pass, by name; see `explain.replay.Replay`.
    """

    rows: int
    num_layers: int
    num_sites: int
    device: torch.device
    residual: list[list[Tensor]] = field(init=False)
    query: list[list[Tensor]] = field(init=False)
    output: list[list[Tensor]] = field(init=False)
    gate: list[list[Tensor]] = field(init=False)
    write_scale: list[list[Tensor]] = field(init=False)
    attended: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    final: list[Tensor] = field(default_factory=list)
    seen: list[list[Tensor | None]] = field(init=False)
    scoring: list[Scoring] = field(init=False)
    last: list[int | None] = field(default_factory=list)
    embeds: list[Tensor] = field(default_factory=list)
    positions: list[Tensor | None] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.residual = [[] for _ in range(self.num_layers)]
        sites = range(self.num_sites)
        self.query, self.output = [[] for _ in sites], [[] for _ in sites]
        self.gate, self.write_scale = [[] for _ in sites], [[] for _ in sites]
        self.seen = [[] for _ in range(self.num_sites)]
        self.scoring = [Scoring(0.0)] * self.num_sites

    def cut(self) -> Recording:
        """Return what was recorded until now as a separate recording, and clear this one."""
        past = copy(self)
        self.__init__(self.rows, self.num_layers, self.num_sites, self.device)  # type: ignore[misc]
        return past

    def take(self, hidden: Tensor) -> Tensor:
        """Return the recorded rows of [B, R, ...].

        They are copied if the pass has other rows, so that the memory of those can be freed.
        """
        rows = hidden if hidden.shape[1] == self.rows else hidden[:, -self.rows :].clone()
        return (rows.detach() if rows.requires_grad else rows).to(self.device)

    def add(
        self,
        found: DecoderOutput,
        rows: Sequence[int],
        scales: Sequence[float],
        seen: Sequence[Tensor | None] = (),
        last: int | None = None,
    ) -> None:
        """Add a pass of one sequence whose layers were run directly.

        Args:
            found: What it gave.
            rows: Where the recorded rows lie in what it gave.
            scales: The factor of the scores of each layer.
            seen: Which keys these rows see in each layer, bool [1, R, N] or None for all before them.
            last: Position of the last row.
        """
        assert found.residual is not None
        assert found.query is not None
        assert found.output is not None
        self.final.append(found.hidden[list(rows)][None])
        self.scoring = [Scoring(scale) for scale in scales]
        self.last.append(last)
        for layer in range(len(scales)):
            self.residual[layer].append(found.residual[None, :, layer])
            self.query[layer].append(found.query[None, :, layer])
            self.output[layer].append(found.output[None, :, layer])
            self.seen[layer].append(seen[layer] if seen else None)

    def on_attention(
        self, site: int, query: Tensor, keys: int, mask: Tensor | None, scoring: Scoring, closed: Closed | None
    ) -> None:
        self.scoring[site] = scoring
        self.query[site].append(self.take(query.transpose(1, 2)))
        if site == 0:
            self.last.append(mask.offset + mask.rows - 1 if isinstance(mask, RowMask) else None)
        seen = None
        if mask is not None and not (isinstance(mask, RowMask) and mask.causal and closed is None):
            rows = query.shape[2]
            visible, bias = seen_by(mask, max(0, rows - self.rows), rows, rows, keys, closed)
            if visible.shape[1] > 1 or (bias is not None and torch.where(visible, bias, 0).any()):
                raise InputError(
                    "the attention mask differs from head to head, or adds to the scores of keys that are seen: an"
                    " explanation knows masks that close keys alone, for all heads; pass such a mask to generate only"
                )
            seen = visible[:, 0]
        self.seen[site].append(seen)
