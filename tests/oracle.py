"""Tolerances that come from the reference's own error, and random problems for the log-probability op."""

from __future__ import annotations

import torch
from mllm_fast.kernels.logprob_increase.base import Base
from mllm_fast.kernels.logprob_increase.reference import logprob_increase as reference
from mllm_fast.kernels.logprob_increase.unembedding import Unembedding


def assert_as_good_as(got: torch.Tensor, low: torch.Tensor, truth: torch.Tensor, magnitude: float) -> None:
    """`got` may err from the float64 `truth` by twice what the reference errs in the same precision (`low`),
    and by four roundings of the largest logit it had to handle: the reference's own error can be small by
    luck, but no float32 logit is better than its rounding."""
    assert not got.isnan().any()
    allowed = 2 * (low.double() - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * magnitude
    worst = (got.double() - truth).abs().max()
    assert worst <= allowed, f"error {worst:.2e}, the reference errs by {(low.double() - truth).abs().max():.2e}"


class Drawn(Base):
    """Any vectors in place of those of residual vectors."""

    def __init__(self, **vectors):
        vars(self).update(vectors)


def problem(
    groups: int,
    rows: int,
    vocab: int,
    width: int,
    depth: int,
    *,
    kind: str = "rms",
    bias: bool = False,
    softcap: float | None = None,
    seed: int = 0,
) -> tuple[dict, Unembedding]:
    """Float64 arguments of the op, sized so that increases lie between about -3 and 3."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    arguments = {
        "residual": draw(groups, width),
        "values": draw(groups, rows, depth) * torch.rand(groups, rows, 1, generator=gen, dtype=torch.float64) ** 4,
        "tokens": torch.randint(vocab, (groups,), generator=gen),
        "projection": draw(groups, width, depth) / depth**0.5,
        "final": 2 * draw(groups, width),
    }
    unembedding = Unembedding(
        weight=3 * draw(vocab, width) / width**0.5,
        gain=1 + 0.3 * draw(width),
        norm_bias=0.3 * draw(width) if kind == "layer" else None,
        bias=draw(vocab) if bias else None,
        kind=kind,
        softcap=softcap,
    )
    return arguments, unembedding


def cast(arguments: dict, unembedding: Unembedding, dtype: torch.dtype) -> tuple[dict, Unembedding]:
    """The same problem in another precision."""
    to = lambda t: t.to(dtype) if t is not None and t.is_floating_point() else t  # noqa: E731
    fields = {name: getattr(unembedding, name) for name in ("weight", "gain", "norm_bias", "bias")}
    cast_fields = {name: to(tensor) for name, tensor in fields.items()}
    settings = {name: getattr(unembedding, name) for name in ("eps", "kind", "softcap")}
    return {name: to(t) for name, t in arguments.items()}, Unembedding(**cast_fields, **settings)


def truth_of(arguments: dict, unembedding: Unembedding, norm: str) -> torch.Tensor:
    """The float64 definition, for arguments of any precision."""
    wide, u = cast(arguments, unembedding, torch.float64)
    return reference(**wide, unembedding=u, norm=norm)
