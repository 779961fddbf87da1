"""Scores of a token inside a decoding step: the best heads are chosen on the device, and nothing waits for the host.

The numbers are those of `WriteScores` (arXiv 2411.10950, equation 6). There the host names the heads whose positions
are scored; here their keys, values and projections are gathered by an index that lies on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import InputError
from ..kernels import Base, logprob_increase, wide_type, without_autocast
from ..kernels.knockout_attention.reference import capped
from ..models.text_model import TextModel
from ..runtime.static_step import StepScores
from ..runtime.trace import Trace


class StaticScores:
    """Scores one token's heads, and the positions of the best ones.

    Args:
        text: The text part of a model.
        final_norm: "frozen" or "own", the statistics of the final norm.
        count: How many heads' positions are scored.
        backend: The backend of the kernels.

    Raises:
        InputError: The sites of the model differ in size.
    """

    def __init__(self, text: TextModel, final_norm: str = "frozen", count: int = 10, backend: str = "auto"):
        sizes = {(site.num_heads, site.num_kv_heads, site.key_dim, site.head_dim) for site in text.sites}
        if len(sizes) > 1:
            raise InputError("static=True explains models whose layers have heads of one size: leave static out")
        text.check_writes()
        self._text, self._norm, self._backend = text, final_norm, backend
        self._count = min(count, text.num_heads * len(text.sites))
        self._unembedding = text.unembedding()

    @without_autocast
    def __call__(self, trace: Trace, token: Tensor) -> StepScores:
        """Score the token [1] that the row of a trace predicts; the keys that it does not see score 0."""
        text = self._text
        sites, heads, wide = len(text.sites), text.num_heads, wide_type(trace.output.dtype)
        residual = trace.residual[0]
        residual = residual if sites == len(residual) else torch.stack([residual[i] for i in text.site_layers])
        final = trace.final.expand(sites, -1)
        base = Base(residual, token.expand(sites), self._unembedding, self._norm, final, checked=False)
        output = trace.output[0].to(wide)  # [S, H, D]
        if trace.write_scale is not None:
            output = output * trace.write_scale[0].to(wide)[:, None, None]
        parts = [
            (output[some, :, None] @ weight)[:, :, 0] for some, weight in text.writes.projections(output.device, wide)
        ]
        each = {"unembedding": self._unembedding, "backend": self._backend}
        scores = logprob_increase(base, torch.cat(parts), **each).reshape(sites, heads)
        best = scores.flatten().topk(self._count).indices
        site = torch.div(best, heads, rounding_mode="floor")
        values = self._values(trace, site, best - site * heads).to(wide)
        projections = self._projections(best, wide)
        found = logprob_increase(base, values, projection=projections, source=site, **each)
        return StepScores(scores, best, found)

    def _values(self, trace: Trace, site: Tensor, head: Tensor) -> Tensor:
        """Return what heads give to the output projection from every position, [k, N, D]."""
        heads = self._text.num_heads
        wide = wide_type(trace.query.dtype)
        query = _of_both(trace.query[0], site, head).to(wide)  # [k, D]
        shared = torch.div(head * len(trace.keys[0]), heads, rounding_mode="floor")
        key, value = (_gathered(many, site, shared).to(wide) for many in (trace.keys, trace.values))
        seen = torch.stack([one[0] for one in trace.seen]).index_select(0, site)  # type: ignore[index]
        like = {"dtype": wide, "device": query.device}
        scales = _constant([one.scale for one in trace.scoring], **like).index_select(0, site)
        scores = capped((key @ query[..., None])[..., 0] * scales[:, None], trace.scoring[0].softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        sinks = self._sinks(trace, site, head)
        top = top if sinks is None else torch.maximum(top, sinks)
        shares = (scores - top).exp()
        total = shares.sum(-1, keepdim=True)
        total = total if sinks is None else total + (sinks - top).exp()
        found = (shares / total)[..., None] * value
        if any(one is not None for one in trace.gate):
            gates = [torch.ones_like(trace.output[:, i]) if one is None else one for i, one in enumerate(trace.gate)]
            found = found * _of_both(torch.cat(gates), site, head)[:, None].to(wide)
        if trace.write_scale is not None:
            found = found * trace.write_scale[0].index_select(0, site)[:, None, None].to(wide)
        return found

    @staticmethod
    def _sinks(trace: Trace, site: Tensor, head: Tensor) -> Tensor | None:
        """Return the sinks of heads, [k, 1], or None if no site has any."""
        each = [one.sinks for one in trace.scoring]
        if all(one is None for one in each):
            return None
        like = next(one for one in each if one is not None)
        whole = torch.stack([torch.full_like(like, -torch.inf) if one is None else one for one in each])
        return _of_both(whole, site, head)[:, None].to(wide_type(trace.query.dtype))

    def _projections(self, best: Tensor, wide: torch.dtype) -> Tensor:
        """Return the O_j of heads, [k, hidden size, D], without a copy of those of all."""
        heads, found = self._text.num_heads, None
        for some, weight in self._text.writes.projections(best.device, wide):
            own = best - some.start * heads
            count = weight.shape[0] * heads
            inside = (own >= 0) & (own < count)
            part = weight.flatten(0, 1).index_select(0, own.clamp(0, count - 1)) * inside[:, None, None]
            found = part if found is None else found + part
        assert found is not None
        return found.mT


def _of_both(whole: Tensor, site: Tensor, head: Tensor) -> Tensor:
    """Return entries of an array [S, H, ...] by two indices."""
    return whole.flatten(0, 1).index_select(0, site * whole.shape[1] + head)


def _gathered(many: Sequence[Tensor], site: Tensor, head: Tensor) -> Tensor:
    """Return keys or values of heads, [k, N, D], from one array [Hkv, N, D] a site."""
    found = None
    for i, one in enumerate(many):
        part = one.index_select(0, head) * (site == i)[:, None, None]
        found = part if found is None else found + part
    assert found is not None
    return found


def _constant(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as an array, made on the device one by one: a copy from the host would be waited for."""
    return torch.cat([torch.full((1,), one, dtype=dtype, device=device) for one in numbers])
