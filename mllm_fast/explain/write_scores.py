"""Log-probability increases (arXiv 2411.10950, equation 6) of head writes, as a whole and position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import Base, OperatorCache, Unembedding, logprob_increase, wide_type, without_autocast
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

    def heads(self) -> Tensor:
        """Return the score of every head's write at every token, float32 [tokens, layers, heads], on the CPU.

        Layers without attention have no write, so their scores are 0.
        """
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
        base, first = self._base(range(index, index + 1))
        device = self.trace.residual.device
        parts = []
        for start in range(0, len(heads), step):
            part = heads[start : start + step]
            writes = self.text_model.writes
            states = {site: writes.write_state(site) for site in {site for site, _ in part}}
            projections = {site: writes.of_heads(site, state)[1] for site, state in states.items()}
            values = self.trace.position_values(index, part, self.backend)
            if self.trace.write_scale is not None:
                values *= self.trace.write_scale[index, [site for site, _ in part]].to(values)[:, None, None]
            scores = logprob_increase(
                base,
                values,
                unembedding=self.unembedding,
                projection=[_on(projections[site][head], device) for site, head in part],
                source=torch.tensor([first + site for site, _ in part], device=device),
                backend=self.backend,
                operators=self.operators,
                keys=[(site, head, states[site]) for site, head in part],
            )
            parts.append(self.trace.spread(scores, [site for site, _ in part], length))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forget(self) -> None:
        """Drop the logits that are kept for the next call."""
        self._logits = self._logs = None

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
        sites, num_heads = len(self.text_model.sites), self.text_model.num_heads
        device, wide = trace.residual.device, wide_type(trace.output.dtype)
        writes = torch.empty(sites, num_heads, count, trace.residual.shape[-1], dtype=wide, device=device)
        output = trace.output[tokens.start : tokens.stop].to(wide).permute(1, 2, 0, 3)  # [S, H, T, D]
        if trace.write_scale is not None:
            output = output * trace.write_scale[tokens.start : tokens.stop].to(wide).T[:, None, :, None]
        for some, weight in self.text_model.writes.projections(device, wide):
            torch.matmul(output[some], weight, out=writes[some])
        base, _ = self._base(tokens)
        scores = logprob_increase(
            base, writes.permute(2, 0, 1, 3).flatten(0, 1), unembedding=self.unembedding, backend=self.backend
        )
        return scores.reshape(count, sites, num_heads)

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
            ids = torch.tensor(named, device=residual.device)
            self._logits = tokens, Base(residual, ids, self.unembedding, self.norm, final)
        held, base = self._logits
        return base, (tokens.start - held.start) * len(self.text_model.sites)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)
