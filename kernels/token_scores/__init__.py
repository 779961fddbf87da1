"""The increases of one explained token by the writes of all heads and positions, for a small vocabulary.

It computes what `logprob_increase` computes in the factored way, with frozen statistics of a root mean square norm
(arXiv 2411.10950, equation 6): S(j) = log p(b | h + O_j u) - log p(b | h). There a call takes longer to prepare than to
run if the vocabulary is small. Here the operators W_U diag(g) O_j of all heads are made once, and a token takes two
calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..extension import cpu_extension
from ..logprob_increase import Unembedding
from ..paths import instruction_set

__all__ = ["TokenScorer", "scorable"]

MOST_BYTES = 1 << 26  # of the operators of all heads


def scorable(unembedding: Unembedding, projections: Sequence[Tensor], heads: int) -> bool:
    """Return whether `TokenScorer` serves an unembedding and output projections [d, heads * width], one a layer."""
    tensors = [unembedding.weight, unembedding.gain, *projections]
    plain = unembedding.kind == "rms" and unembedding.softcap is unembedding.bias is unembedding.norm_bias is None
    if not plain or cpu_extension()[0] is None or any(one is None for one in tensors):
        return False
    fits = all(one.dtype == torch.float32 and one.device.type == "cpu" and one.is_contiguous() for one in tensors)  # type: ignore[union-attr]
    same = len({one.shape for one in projections}) == 1 and projections[0].shape[1] % heads == 0
    return fits and same and len(projections) * projections[0].shape[1] * len(unembedding.weight) * 4 <= MOST_BYTES


class TokenScorer:
    """Scores the writes of single tokens. The weights are copied: make another when they change.

    Args:
        unembedding: The final norm and the unembedding.
        projections: The output projection of each layer, [d, heads * width].
        heads: How many heads a layer has.
        isa: An instruction set, for tests; the best of the processor by default.

    Raises:
        ValueError: The weights are not of the kind that `scorable` accepts.
    """

    def __init__(self, unembedding: Unembedding, projections: Sequence[Tensor], heads: int, isa: str | None = None):
        if not scorable(unembedding, projections, heads):
            raise ValueError(
                "token scores take float32 weights on the CPU, a root mean square norm with a gain, no biases and no"
                f" soft cap, and at most {MOST_BYTES:,} bytes of operators; use logprob_increase"
            )
        extension, _ = cpu_extension()
        vocab, hidden = unembedding.weight.shape
        self.layers, self.heads, self.width = len(projections), heads, projections[0].shape[1] // heads
        self.hidden, self.vocab = hidden, vocab
        gain = unembedding.gain
        self._isa = isa or instruction_set("token_scores", torch.float32)
        self._made = extension.TokenScorer(  # type: ignore[union-attr]
            (self.layers, heads, self.width, hidden, vocab),
            unembedding.eps,
            (unembedding.weight.data_ptr(), gain.data_ptr()),  # type: ignore[union-attr]
            [one.data_ptr() for one in projections],
        )
        self._padded = self._made.padded()

    def score_heads(self, residual: Tensor, output: Tensor, final: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """Return the increase of log p(token) by each head's write, and what `score_positions` needs.

        Args:
            residual: Input of every layer, float32 [L, d].
            output: What the heads give to the output projection, float32 [L, H, D].
            final: Output of the last layer, float32 [d].
            token: The explained token.

        Returns:
            The scores, float32 [L, H], and the logarithms of the probabilities at each layer's input.

        Raises:
            ValueError: A shape, a dtype or the token does not fit.
        """
        shapes = (self.layers, self.hidden), (self.layers, self.heads, self.width), (self.hidden,)
        for name, one, shape in zip(("residual", "output", "final"), (residual, output, final), shapes, strict=True):
            if one.shape != shape or one.dtype != torch.float32:
                raise ValueError(f"{name} is float32 {list(shape)}, got {one.dtype} {list(one.shape)}")
        self._check(token)
        residual, output, final = residual.contiguous(), output.contiguous(), final.contiguous()
        logs, scores = torch.empty(self.layers, self._padded), torch.empty(self.layers, self.heads)
        rows = residual.data_ptr(), output.data_ptr(), final.data_ptr()
        self._made.heads(rows, token, (logs.data_ptr(), scores.data_ptr()), self._isa)
        return scores, logs

    def score_positions(
        self, logs: Tensor, final: Tensor, token: int, heads: Sequence[tuple[int, int]], values: Tensor
    ) -> Tensor:
        """Return the increase of log p(token) by each position's write of some heads, float32 [G, N].

        Args:
            logs: What `score_heads` returned for the token.
            final: As there.
            token: The explained token.
            heads: The (layer, head) pairs of the G heads.
            values: What each position gives to their output projections, float32 [G, N, D].

        Raises:
            ValueError: A shape, a dtype, a head or the token does not fit.
        """
        count = values.shape[1] if values.ndim == 3 else 0
        if values.shape != (len(heads), count, self.width) or values.dtype != torch.float32:
            raise ValueError(
                f"values is float32 [{len(heads)}, N, {self.width}], got {values.dtype} {list(values.shape)}"
            )
        if logs.shape != (self.layers, self._padded) or final.shape != (self.hidden,):
            raise ValueError(f"logs and final are those of score_heads, got {list(logs.shape)}, {list(final.shape)}")
        if any(not (0 <= layer < self.layers and 0 <= head < self.heads) for layer, head in heads):
            raise ValueError(f"heads lie in 0 .. {self.layers - 1}, 0 .. {self.heads - 1}, got {list(heads)}")
        self._check(token)
        values, final = values.contiguous(), final.contiguous()
        scores = torch.empty(len(heads), count)
        if scores.numel():
            self._made.positions(
                (final.data_ptr(), logs.data_ptr()),
                token,
                [layer * self.heads + head for layer, head in heads],
                values.data_ptr(),
                count,
                scores.data_ptr(),
                self._isa,
            )
        return scores

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab:
            raise ValueError(f"token lies in 0 .. {self.vocab - 1}, got {token}")
