"""Norms by what they compute: gain, bias and epsilon of a norm, found by running it on random rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.split import local
from ..kernels import wide_type
from .offload import device_of, read_in

_SIZES = (3.0, 3.0, 1e-3, 1e-3)  # of the random rows


@dataclass(frozen=True)
class Norm:
    """What a norm computes: gain * (x - centre) / sqrt(mean square + eps) + bias.

    Attributes:
        kind: "rms" divides by the root mean square. "layer" subtracts the mean and divides by the standard deviation.
        gain: The factor of each channel, [d], or None for 1.
        bias: The bias, [d], or None.
        eps: The number that is added to the mean square.
        one_plus: Whether the gain is 1 plus the module's weight.
    """

    kind: str
    gain: Tensor | None
    bias: Tensor | None
    eps: float
    one_plus: bool = False

    def read(self, module: nn.Module) -> Norm:
        """Return the same kind of norm with the parameters that the module has now."""
        with read_in(module):
            gain, bias = vector_of(module, "weight"), vector_of(module, "bias")
            gain = 1 + gain.to(wide_type(gain.dtype)) if gain is not None and self.one_plus else gain
            return replace(self, gain=gain, bias=bias)

    def centred(self, rows: Tensor) -> Tensor:
        """Return rows [..., d] minus their mean for a layer norm, and the rows themselves for an RMS norm."""
        return rows if self.kind == "rms" else rows - rows.mean(-1, keepdim=True)

    def scale(self, rows: Tensor) -> Tensor:
        """Return the factor by which the norm multiplies the centred rows [..., d], without the gain, as [...]."""
        return torch.rsqrt(self.centred(rows).square().mean(-1) + self.eps)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the norm's output for rows [..., d], in their dtype."""
        out = self.centred(rows) * self.scale(rows)[..., None]
        out = out if self.gain is None else out * self.gain.to(rows)
        return out if self.bias is None else out + self.bias.to(rows)


@torch.no_grad()
def norm_of(module: nn.Module, name: str, width: int) -> Norm:
    """Return what a norm computes.

    It is run on random rows, and compared with each kind of norm that its parameters may mean: a root mean square or a
    standard deviation, a gain of the weight or of 1 plus the weight, and each of its epsilons.

    Args:
        module: The norm.
        name: Its name in messages.
        width: The size of its rows.

    Raises:
        InputError: It computes something else. The message has the name, and the error of the nearest kind.
    """
    part: Any = module
    weight: Any = getattr(part, "weight", None)
    known = isinstance(weight, Tensor)
    device, dtype = (device_of(part), weight.dtype) if known else (torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(0)
    # rows with a mean, which tell the two kinds apart; small rows tell the epsilons apart
    rows = (torch.randn(len(_SIZES), width, generator=draw) + 1) * torch.tensor(_SIZES)[:, None]
    rows = rows.to(device, dtype)
    got = part(rows)
    if not isinstance(got, Tensor) or got.shape != rows.shape:
        raise InputError(f"{name} is a {type(module).__name__}, which does not give a row for a row as a norm does")
    with read_in(part):
        each = [(_error(got, norm.read(part), rows), norm) for norm in _candidates(part)]
    error, norm = min(each, key=lambda one: one[0])
    if error <= allowed_error(got):
        return norm.read(part)
    raise InputError(
        f"{name} ({type(module).__name__}) computes something else than an RMS norm or a layer norm with its weights"
        f" (by {error:.2g} of its output): scores are made from its weights. Merge adapters into the model (peft:"
        " model.merge_and_unload()), or remove hooks from it"
    )


def _candidates(module: Any) -> Iterator[Norm]:
    """Yield what the parameters of a norm may mean, without their values; of equals the first is taken."""
    eps = [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    for kind in ("rms", "layer"):
        for one_plus in (False, True):
            for small in dict.fromkeys([*eps, 1e-6, 1e-5, torch.finfo(torch.float32).eps]):
                yield Norm(kind, None, None, small, one_plus)


def vector_of(module: Any, name: str) -> Tensor | None:
    """Return a parameter of one dimension, detached, or None if the module has none of this name."""
    found = local(getattr(module, name, None))
    return found.detach() if isinstance(found, Tensor) and found.ndim == 1 else None


def _error(got: Tensor, norm: Norm, rows: Tensor) -> float:
    """Return the largest relative error of a row."""
    return max(relative_error(*pair) for pair in zip(got, norm(rows.double()), strict=True))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over that of `wanted`."""
    return float((got.double() - wanted.to(got.device)).norm() / wanted.norm().clamp_min(1e-300))


def allowed_error(got: Tensor) -> float:
    """Return the relative error that rounding may cause, by the dtype or by products of lower precision."""
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps)  # norms of float64 work in float32
    if got.element_size() == 2:
        return 4 * eps
    if got.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 4 * torch.finfo(torch.bfloat16).eps
    return 64 * eps
