"""What happens at the seams of a model while it is recorded: its attention, its masks, and what is noted of a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from ..core.errors import InputError
from ..kernels import wide_type
from ..kernels.knockout_attention.reference import open_pairs
from ..knockout.attention_share import AttentionObserver
from ..knockout.plan import Plan
from ..models.linears import device_of_linear
from ..models.text_model import TextModel
from . import compiled
from .attention import Closed, Scoring, attend, attend_dense, first_row, seen_by
from .record import Recording
from .row_mask import RowMask, row_mask

AttentionFn = Callable[[int, Tensor, Tensor, Tensor, Scoring], Tensor]  # site, query, key, value, scoring -> output
OnWeights = Callable[[int, Tensor], None]  # site, alpha [B, H, R, N]


@dataclass
class Interception:
    """What happens at the seams of one block; see `hooks.recording` for the fields.

    Attributes:
        record: What was recorded.
        first: Positions that were read before the pass.
        masks: The masks of the pass, by what names them in a graph.
        ends: Of a pass of a graph, how many keys of a static cache were written, by the number of its keys.
    """

    text: TextModel
    rows: int
    knockouts: Plan | None
    shares: AttentionObserver | None
    backend: str
    attention_fn: AttentionFn | None = None
    on_weights: OnWeights | None = None
    record: Recording = field(init=False)
    first: int = 0
    masks: dict[int, RowMask] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = device_of_linear(self.text.head)
        self.record = Recording(self.rows, len(self.text.layers), len(self.text.sites), where)

    def attend(
        self, site: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scoring: Scoring
    ) -> Tensor:
        """Compute the attention of a site, [B, R, H, D], and record it."""
        slot = compiled.slot_of(attention_mask)
        if slot is not None:
            attention_mask = self.masks[slot]
        # without the end of a static cache that nothing was written to
        if attention_mask is not None and self.attention_fn is None:
            count = attention_mask.shape[3]
            key, value = key[:, :, :count], value[:, :, :count]
        if self.attention_fn is not None:
            if self.rows:
                self.record.on_attention(site, query, key.shape[2], None, scoring, None)
            output = self.attention_fn(site, query, key, value, scoring)
        else:
            closed = self._closed(site, query, key.shape[2], attention_mask)
            if self.on_weights is not None:
                output, alpha = attend_dense(query, key, value, attention_mask, scoring, closed)
                self.on_weights(site, alpha)
                return output.transpose(1, 2).contiguous()
            output = self._attend(site, query, key, value, attention_mask, scoring, closed)
        output = output.transpose(1, 2)
        if self.rows:
            self.record.output[site].append(self.record.take(output))
        return output.contiguous()

    def attend_in_graph(
        self, site: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
    ) -> Tensor:
        """Compute the attention of a site for a compiled graph, which gives the memory of its tensors to others."""
        if self.rows:
            query = query.clone()
            if self.text.sites[site].cache is None:
                key, value = key.clone(), value.clone()
        if mask is not None and compiled.slot_of(mask) is None:  # an array: a graph does not know where its keys end
            mask = mask[..., : self.ends.get(mask.shape[3], mask.shape[3])]
        return self.attend(site, query, key, value, mask, scoring)

    def make_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make the mask of a forward pass; see `row_mask`."""
        mask = row_mask(*args, **kwargs)
        if isinstance(mask, RowMask):
            mask.keep = self._keep
        return mask

    def make_mask_in_graph(self, slot: int, *args: Any, **kwargs: Any) -> None:
        """Make a causal mask for a compiled graph, which names it by its slot."""
        mask = row_mask(*args, **kwargs)
        assert isinstance(mask, RowMask)
        self.masks[slot] = mask

    def _keep(self, mask: RowMask) -> Tensor:
        """Keep a mask, and return what names it."""
        slot = 0 if mask.rule is causal_mask_function else 1
        self.masks[slot] = mask
        return compiled.ticket(slot, mask.device)

    def attend_outside(self, module: nn.Module, query, key, value, mask, scoring: Scoring) -> Tensor:
        """Compute cross-attention to the keys of the images, which lie outside the sequence, [B, R, H, D].

        A row that may not attend to an image's token may not attend to its keys either.
        """
        layer = next((i for i in self.text.findings.others if module in set(self.text.layers[i].modules())), None)
        if layer is None or self.rows or self.attention_fn is not None or self.on_weights is not None:
            raise InputError(
                f"a {type(module).__name__} attends, which does not when the model reads text alone: cross-attention to"
                " keys outside the sequence can be knocked out, and cannot be explained or compressed"
            )
        batch, rows, keys = len(query), query.shape[2], key.shape[2]
        seen = torch.ones(batch, 1, rows, keys, dtype=torch.bool, device=query.device)
        if mask is not None:
            whole, bias = seen_by(mask, 0, rows, rows, keys, None)
            if bias is not None and torch.where(whole, bias, 0).any():
                raise InputError("cross-attention with a mask that adds to the scores of seen keys is not supported")
            seen = seen & whole
        rules = None if self.knockouts is None else self.knockouts.layers[layer]
        if rules is not None:
            images = rules.images
            if images is None or keys % max(1, images.shape[1]):
                raise InputError("knockouts of a model with cross-attention need the same number of images a prompt")
            rules = rules.on(query.device)
            kinds = rules.segments(batch, self.first + rows)[:, self.first :]
            images = images.to(kinds.device).repeat_interleave(batch // len(images), 0)
            images = images.repeat_interleave(keys // images.shape[1], 1)
            seen = seen & open_pairs(kinds.expand(batch, -1), images, rules.table)[:, None]
        found = attend(query, key, value, seen, scoring, None, False, self.backend)
        observed = self.shares
        if observed is not None and observed.wants(self.first, rows) is not False:
            observed.add_outside(layer, seen.any(-1).to(query.dtype).mean(2).expand(-1, query.shape[1]))
        return found.output.transpose(1, 2).contiguous()

    def _closed(self, site: int, query: Tensor, keys: int, mask: Tensor | None) -> Closed | None:
        """Return segments and table of the knockouts at a site, or None if it has none."""
        rules = None if self.knockouts is None else self.knockouts.layers[self.text.sites[site].layer]
        if rules is None:
            return None
        # keep only the positions of the keys: with a sliding window they do not begin at 0
        before = mask.key_offset if isinstance(mask, RowMask) else 0
        rules = rules.on(query.device)
        return rules.segments(len(query), before + keys)[:, before:], rules.table

    def _attend(self, site: int, query, key, value, mask, scoring: Scoring, closed: Closed | None) -> Tensor:
        if self.rows:
            if self.text.sites[site].cache is None:
                self.record.attended[site] = key, value
            self.record.on_attention(site, query, key.shape[2], mask, scoring, closed)
        observed = self.shares
        first = first_row(mask, query.shape[2], key.shape[2]) if mask is not None else 0
        mass = False if observed is None else observed.wants(first, query.shape[2])
        if isinstance(mass, Tensor):
            mass = mass.to(query.device)
        found = attend(query, key, value, mask, scoring, closed, mass, self.backend)
        if observed is not None and found.mass is not None:
            observed.add(site, found.mass)
        return found.output

    def zeroed(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the inputs of a layer, with zeros in the rows that a knockout names."""
        rules = None if self.knockouts is None else self.knockouts.layers[layer]
        if rules is None or rules.zeroed is None:
            return hidden
        rules = rules.on(hidden.device)
        assert rules.zeroed is not None
        kinds = rules.segments(len(hidden), self.first + hidden.shape[1])[:, self.first :].long()
        return hidden.masked_fill(rules.zeroed[kinds][..., None], 0)

    def note(self, kind: str, index: int, rows: Tensor) -> None:
        """Record rows of a pass, or how many were read before it."""
        record = self.record
        if kind == "first":
            self.first = int(rows)
        elif kind == "end":
            self.ends[index] = min(index, int(rows))
        elif kind == "residual":
            record.residual[index].append(record.take(rows))
        elif kind == "final":
            record.final.append(record.take(rows))
        elif kind == "output":
            attended = record.output[index][-1]
            given = record.take(rows).reshape(attended.shape)
            # a head whose output is 0 has no gate to be read, and nothing that it multiplies
            record.gate[index].append(torch.where(attended == 0, 0, given / attended))
            record.output[index][-1] = given
        else:
            assert kind == "post norm"
            taken, norm = record.take(rows), self.text.post_norm(index)
            assert norm is not None
            record.write_scale[index].append(norm.scale(taken.to(wide_type(taken.dtype))))

    def note_inputs(self, embeds: Tensor, positions: Tensor | None, others: dict[str, Any]) -> None:
        """Record what the decoder gets in a pass."""
        self.record.embeds.append(embeds)
        self.record.positions.append(positions)
        self.record.others.append({name: self._named(given) for name, given in others.items()})

    def _named(self, given: Any) -> Any:
        """Return the mask that a ticket names, in a dict too; anything else as it is."""
        if isinstance(given, dict):
            return {name: self._named(one) for name, one in given.items()}
        slot = compiled.slot_of(given) if isinstance(given, Tensor) and given.ndim == 4 else None
        return given if slot is None else self.masks[slot]
