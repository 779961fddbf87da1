"""The final norm and the unembedding, which turn a residual vector into log-probabilities, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..skinny_linear import skinny_linear
from ..skinny_linear.torch_kernel import blocks


@dataclass(frozen=True)
class Unembedding:
    """The final norm and the unembedding: p(. | x) = softmax(cap(weight norm(x) + bias)).

    Attributes:
        weight: Weight of the unembedding, [V, d].
        gain: Gain of the norm, [d], or None.
        norm_bias: Bias of the norm, [d], or None.
        bias: Bias of the unembedding, [V], or None.
        eps: Number that the norm adds to the mean square.
        kind: "rms" divides by the root mean square. "layer" subtracts the mean and divides by the standard deviation.
        softcap: The soft cap c in c tanh(logit / c), or None.

    Raises:
        ValueError: An attribute is not valid. The message names the attribute, what it got and what it takes.
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
        """Return x [..., d] minus its mean for a layer norm, and x itself for an RMS norm."""
        return x if self.kind == "rms" else x - x.mean(-1, keepdim=True)

    def scale(self, x: Tensor) -> Tensor:
        """Return the factor by which the norm multiplies the centred x [..., d], without the gain, as [...]."""
        return torch.rsqrt(self.centred(x).square().mean(-1) + self.eps)

    def times(self, columns: Tensor) -> Tensor:
        """Compute weight diag(gain) columns, accumulated in float32 or wider.

        The weight is widened one block of rows at a time, never as a whole.

        Args:
            columns: [d, n].

        Returns:
            The product, [V, n].
        """
        if self.gain is not None:
            columns = self.gain.to(columns.dtype)[:, None] * columns
        if self.weight.dtype == columns.dtype:
            return self.weight @ columns
        out = columns.new_empty(self.weight.shape[0], columns.shape[1])
        for block in blocks(self.weight):
            out[block] = self.weight[block].to(columns.dtype) @ columns
        return out

    def of_rows(self, rows: Tensor, backend: str = "auto") -> Tensor:
        """Compute weight diag(gain) row for each of the rows [n, d], as [n, V]; `backend` as in `skinny_linear`."""
        rows = rows if self.gain is None else rows * self.gain.to(rows.dtype)
        return skinny_linear(rows, self.weight, backend=backend)

    def offset(self, dtype: torch.dtype, backend: str = "auto") -> Tensor | None:
        """Return the part of the logits that does not depend on x.

        Args:
            dtype: Dtype of the result.
            backend: As in `skinny_linear`.

        Returns:
            weight norm_bias + bias, [V], or None if both biases are None.
        """
        total = None
        if self.norm_bias is not None:
            total = skinny_linear(self.norm_bias.to(dtype), self.weight, backend=backend)
        if self.bias is not None:
            total = self.bias.to(dtype) if total is None else total + self.bias.to(dtype)
        return total
