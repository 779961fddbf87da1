"""From a residual vector to log-probabilities: the final norm and the unembedding, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..few_row_linear import few_row_linear
from ..few_row_linear.torch_kernel import blocks


@dataclass(frozen=True)
class Unembedding:
    """p(. | x) = softmax(cap(weight norm(x) + bias)).

    weight: [V, d]. gain, norm_bias: [d] or None; bias: [V] or None. kind: "rms" divides by the root mean
    square, "layer" by the standard deviation after taking the mean off. eps: added to the mean square.
    softcap: c in c tanh(logit / c), or None.
    """

    weight: Tensor
    gain: Tensor | None = None
    norm_bias: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    kind: str = "rms"
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"kind is 'rms' or 'layer', got {self.kind!r}")
        if self.weight.ndim != 2:
            raise ValueError(f"weight is [V, d], got shape {tuple(self.weight.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is a positive number or None, got {self.softcap}")
        vocab, width = self.weight.shape
        for name, size in (("gain", width), ("norm_bias", width), ("bias", vocab)):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (size,):
                raise ValueError(f"{name} has shape [{size}], got {tuple(tensor.shape)}")

    def centred(self, x: Tensor) -> Tensor:
        """x [..., d] without what the norm takes off it: its mean, or nothing."""
        return x if self.kind == "rms" else x - x.mean(-1, keepdim=True)

    def scale(self, x: Tensor) -> Tensor:
        """What the norm multiplies x [..., d] by, but for the gain: [...]."""
        return torch.rsqrt(self.centred(x).square().mean(-1) + self.eps)

    def times(self, columns: Tensor) -> Tensor:
        """weight diag(gain) columns, [V, d] x [d, n] -> [V, n], accumulated in float32 or wider; the
        weight is widened a block of rows at a time, never as a whole."""
        if self.gain is not None:
            columns = self.gain.to(columns.dtype)[:, None] * columns
        if self.weight.dtype == columns.dtype:
            return self.weight @ columns
        out = columns.new_empty(self.weight.shape[0], columns.shape[1])
        for block in blocks(self.weight):
            out[block] = self.weight[block].to(columns.dtype) @ columns
        return out

    def of_rows(self, rows: Tensor, backend: str = "auto") -> Tensor:
        """The same of vectors [n, d], as [n, V]; backend as `few_row_linear` takes it."""
        rows = rows if self.gain is None else rows * self.gain.to(rows.dtype)
        return few_row_linear(rows, self.weight, backend=backend)

    def offset(self, dtype: torch.dtype, backend: str = "auto") -> Tensor | None:
        """What does not depend on x: weight norm_bias + bias, [V], or None; backend as `few_row_linear` takes it."""
        total = None
        if self.norm_bias is not None:
            total = few_row_linear(self.norm_bias.to(dtype), self.weight, backend=backend)
        if self.bias is not None:
            total = self.bias.to(dtype) if total is None else total + self.bias.to(dtype)
        return total
