"""Log-probability increases (arXiv 2411.10950, equation 6) of head writes, as a whole and position by position."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import (
    Base,
    OperatorCache,
    Unembedding,
    joined_increase,
    logprob_increase,
    shard_increase,
    wide_type,
    without_autocast,
)
from ..kernels.token_scores import TokenScorer
from ..models.text_model import TextModel
from ..runtime.trace import Trace
from .token_scorer import token_scorer

_SMALL = 2e7  # flops of a call that takes longer to prepare than to compute
_WRITE_ELEMENTS = 1 << 24  # limit of the writes handed to the kernel at a time: 64 MiB of float32


@dataclass
class WriteScores:
    """Scores the writes of one recorded answer.

    Args:
        text_model: the text part of the model.
        unembedding: the model's final norm and unembedding.
        trace: the recorded rows and the key/value cache.
        token_ids: the token ids of the answer.
        norm: "frozen" or "own".
        operators: a cache that makes repeated scores fast.
        backend: the backend of the kernels.
    """

    text_model: TextModel
    unembedding: Unembedding
    trace: Trace
    token_ids: Sequence[int]
    norm: str
    operators: OperatorCache
    backend: str
    _logits: tuple[range, Base] | None = field(default=None, init=False, repr=False)
    _logs: Tensor | None = field(default=None, init=False, repr=False)  # of the scorer
    _mass: Tensor | None = field(default=None, init=False, repr=False)  # of the logits of every process

    def heads(self) -> Tensor:
        """Return the score of every head's write at every token, float32 [tokens, layers, heads], on the CPU.

        Layers without attention have no write, so their scores are 0.
        """
        if self.text_model.split is not None:
            self.text_model.split.meet()
        scorer = self._scorer(self.text_model.num_heads * len(self.text_model.sites))
        if scorer is not None:
            return self._score_heads(scorer)[None]
        text, width = self.text_model, self.trace.residual.shape[-1]
        step = max(1, _WRITE_ELEMENTS // (len(text.sites) * text.num_heads * width))
        count = len(self.token_ids)
        parts = [self._heads(range(start, min(start + step, count))) for start in range(0, count, step)]
        scores = torch.cat(parts).float().cpu()
        if len(text.sites) == len(text.layers):
            return scores
        whole = torch.zeros(count, len(text.layers), text.num_heads)
        whole[:, list(text.site_layers)] = scores
        return whole

    def positions(self, index: int, heads: Sequence[tuple[int, int]], length: int) -> Tensor:
        """Return the score of each position's write by some heads at one token.

        There are many rows per head, so the kernel takes the factored way where it is faster.

        Args:
            index: the token's index in the answer.
            heads: the heads, each (layer, head), in layers with attention.
            length: the length of the sequence that the scores are laid out over.

        Returns:
            float32 [heads, length], on the CPU.
        """
        heads = [(self.text_model.site(layer), head) for layer, head in heads]
        stop = self.trace.rows[index] + 1
        scorer = self._scorer(len(heads) * stop)
        if scorer is not None:
            if self._logs is None:
                self._score_heads(scorer)
            values = self.trace.position_values(index, heads, self.backend)
            found = scorer.score_positions(self._logs, self.trace.final[0], self.token_ids[0], heads, values)  # type: ignore
            return self.trace.spread(found, [site for site, _ in heads], length)
        step = max(1, _WRITE_ELEMENTS // (stop * self.text_model.head_dim))
        if self.text_model.split is not None:
            self.text_model.split.meet()
        base, first = self._base(range(index, index + 1))
        device = self.trace.residual.device
        parts = []
        for start in range(0, len(heads), step):
            part = heads[start : start + step]
            values, projection, states = self._position_writes(index, part)
            if self.trace.write_scale is not None:
                values *= self.trace.write_scale[index, [site for site, _ in part]].to(values)[:, None, None]
            scores = self._increase(
                base,
                values,
                projection=[_on(one, device) for one in projection],
                source=torch.tensor([first + site for site, _ in part], device=device),
                operators=self.operators,
                keys=[(site, head, state) for (site, head), state in zip(part, states, strict=True)],
            )
            parts.append(self.trace.spread(scores, [site for site, _ in part], length))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _position_writes(
        self, index: int, heads: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, list[Tensor], list[Hashable]]:
        """Return what some heads, each (site, head), write from every position that a token's row sees.

        Returns:
            What they give to the output projection, [heads, N', Dv], their output projections, [d, Dv] each, and what
            tells these from those of other weights.
        """
        writes, split = self.text_model.writes, self.text_model.split
        first = self.text_model.heads.start
        mine = [(site, head - first) for site, head in heads if head in self.text_model.heads]
        states = {site: writes.write_state(site) for site in {site for site, _ in heads}}
        projections = {site: writes.of_heads(site, state)[1] for site, state in states.items()}
        values = self.trace.position_values(index, mine, self.backend) if mine else ()
        if split is None or len(set(split.heads)) == 1:
            return values, [projections[site][head] for site, head in mine], [states[site] for site, _ in mine]  # type: ignore[return-value]
        device, wide = self.trace.residual.device, wide_type(self.trace.query.dtype)
        shape = self.trace.rows[index] + 1, self.text_model.head_dim
        each = projections[heads[0][0]][0]
        like = [
            torch.empty(shape, dtype=wide, device=device),
            torch.empty(each.shape, dtype=each.dtype, device=device),
            torch.empty(1, dtype=torch.long, device=device),
        ]
        given = [
            [value.to(wide), projections[site][head], torch.tensor([hash(states[site])])]
            for value, (site, head) in zip(values, mine, strict=True)
        ]
        found = split.from_owners(given, [head for _, head in heads], like)
        return torch.stack([one[0] for one in found]), [one[1] for one in found], [int(one[2]) for one in found]

    def _increase(self, base: Base, values: Tensor, source: Tensor | None = None, **choices: Any) -> Tensor:
        """Return the increase by each write, over the words of all processes; see `logprob_increase`."""
        split, choices = self.text_model.split, {**choices, "backend": self.backend, "source": source}
        if split is None or not split.words_split:
            return logprob_increase(base, values, unembedding=self.unembedding, **choices)
        part = shard_increase(base, values, self.unembedding, **choices)
        mass = self._mass[:, base.each(source)]  # type: ignore[index]
        return joined_increase(split.everyone(part), mass)

    def forget(self) -> None:
        """Drop the logits that are kept for the next call."""
        self._logits = self._logs = self._mass = None

    def _scorer(self, rows: int) -> TokenScorer | None:
        """Return what scores `rows` writes of one token at once, or None where a kernel's own call is faster."""
        text, trace = self.text_model, self.trace
        work = 2.0 * rows * len(self.unembedding.weight) * text.head_dim
        plain = all(one.dtype == torch.float32 for one in (trace.residual, trace.output, trace.final))  # no autocast
        single = len(self.token_ids) == 1 and len(trace.residual) == 1 and plain
        if not single or work > _SMALL or self.norm != "frozen" or self.backend not in ("auto", "cpu"):
            return None
        if trace.residual.device.type != "cpu" or trace.write_scale is not None:
            return None
        if any(gate is not None for gate in trace.gate):
            return None
        return token_scorer(text, self.unembedding)

    @without_autocast
    def _score_heads(self, scorer: TokenScorer) -> Tensor:
        trace = self.trace
        scores, self._logs = scorer.score_heads(trace.residual[0], trace.output[0], trace.final[0], self.token_ids[0])
        return scores

    @without_autocast
    def _heads(self, tokens: range) -> Tensor:
        """Return the scores of some tokens, [len(tokens), S, H].

        There is one row per head, so this takes the direct way, with all sites and heads in one call.
        """
        trace, count = self.trace, len(tokens)
        sites, num_heads = len(self.text_model.sites), len(self.text_model.heads)
        device, wide = trace.residual.device, wide_type(trace.output.dtype)
        writes = torch.empty(sites, num_heads, count, trace.residual.shape[-1], dtype=wide, device=device)
        output = trace.output[tokens.start : tokens.stop].to(wide).permute(1, 2, 0, 3)  # [S, H, T, D]
        if trace.write_scale is not None:
            output = output * trace.write_scale[tokens.start : tokens.stop].to(wide).T[:, None, :, None]
        for some, weight in self.text_model.writes.projections(device, wide):
            torch.matmul(output[some], weight, out=writes[some])
        if self.text_model.split is not None:
            writes = self.text_model.split.gather(writes.to(trace.output.dtype), 1)
        base, _ = self._base(tokens)
        return self._increase(base, writes.permute(2, 0, 1, 3).flatten(0, 1)).reshape(count, sites, -1)

    def _base(self, tokens: range) -> tuple[Base, int]:
        """Return the logits at the input of every layer with attention to some tokens' rows, and the first's index.

        The logits are kept, so that calls in succession compute them once.
        """
        if self._logits is None or not (self._logits[0].start <= tokens.start and tokens.stop <= self._logits[0].stop):
            trace, layers = self.trace, self.text_model.site_layers
            residual = trace.residual[tokens.start : tokens.stop]
            residual = residual if len(layers) == residual.shape[1] else residual[:, list(layers)]
            residual = residual.flatten(0, 1)
            named = [token for token in self.token_ids[tokens.start : tokens.stop] for _ in layers]
            final = trace.final[tokens.start : tokens.stop, None].expand(-1, len(layers), -1).flatten(0, 1)
            split = self.text_model.split
            if split is not None:  # the words of other processes are none of this one's
                named = [token - split.my_words.start if token in split.my_words else -1 for token in named]
            ids = torch.tensor(named, device=residual.device)
            base = Base(residual, ids, self.unembedding, self.norm, final)
            self._mass = split.everyone(base.mass) if split is not None and split.words_split else None
            self._logits = tokens, base
        held, base = self._logits
        return base, (tokens.start - held.start) * len(self.text_model.sites)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)
