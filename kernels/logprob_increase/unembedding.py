"""From a residual vector to log-probabilities: the final norm and the unembedding, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements of the unembedding that are widened at a time: 64 MiB of float32


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
        for block in self._blocks():
            out[block] = self.weight[block].to(columns.dtype) @ columns
        return out

    def of_rows(self, rows: Tensor) -> Tensor:
        """The same of vectors [n, d], as [n, V]."""
        return self._of_rows(rows if self.gain is None else rows * self.gain.to(rows.dtype))

    def offset(self, dtype: torch.dtype) -> Tensor | None:
        """What does not depend on x: weight norm_bias + bias, [V], or None."""
        total = None
        if self.norm_bias is not None:
            total = self._of_rows(self.norm_bias.to(dtype)[None])[0]
        if self.bias is not None:
            total = self.bias.to(dtype) if total is None else total + self.bias.to(dtype)
        return total

    def _of_rows(self, rows: Tensor) -> Tensor:
        if self.weight.dtype == rows.dtype:
            return rows @ self.weight.T
        out = rows.new_empty(len(rows), len(self.weight))
        for block in self._blocks():
            out[:, block] = rows @ self.weight[block].to(rows.dtype).T
        return out

    def _blocks(self) -> Iterator[slice]:
        """Rows of the weight that are widened together."""
        step = max(1, _CHUNK // self.weight.shape[1])
        return (slice(start, start + step) for start in range(0, len(self.weight), step))
