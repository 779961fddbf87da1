"""The words that the residual stream of each image token stands for, layer by layer (arXiv 2411.10950, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import without_autocast
from ..models.offload import weight_of
from ..models.text_model import TextModel
from .scores import Scores

_LAYERS = 17  # at most so many layers, evenly spaced, the first and the last among them
_BYTES = 1 << 29  # of residual vectors that are held at a time


class PatchWords(NamedTuple):
    """The nearest words of each image token.

    Attributes:
        layers: The layers whose inputs are read. 0 is the visual embedding itself, read in the embedding space; the
            number of layers stands for the output of the last one.
        words: Every word that occurs.
        best: The nearest words of each layer and token, best first, as indices of `words`, int64 [layers, tokens, k].
    """

    layers: tuple[int, ...]
    words: tuple[str, ...]
    best: Tensor

    def of(self, token: int) -> list[tuple[int, list[str]]]:
        """Return the layers and words of one image token, by its number in the image."""
        return [
            (layer, [self.words[i] for i in row[token].tolist()])
            for layer, row in zip(self.layers, self.best, strict=True)
        ]


@torch.no_grad()
def patch_words(scores: Scores, tokens: Tensor, k: int = 3) -> PatchWords:
    """Return the nearest words of image tokens, as `Explanation.project` finds them for one of them.

    Args:
        scores: The explanation.
        tokens: The positions of the image tokens, int64 [tokens].
        k: The number of words of each.
    """
    text, count = scores.text_model, scores.num_layers
    layers = tuple(torch.linspace(0, count, min(_LAYERS, count + 1)).round().int().tolist())
    width = (count + 1) * text.width * 4
    table = weight_of(text.decoder.get_input_embeddings())  # type: ignore[operator]
    parts = []
    for some in tokens.split(max(1, _BYTES // width)):
        inputs = scores.replay.layer_inputs(some)  # [tokens, layers + 1, d]
        best = []
        for layer in layers:
            values = _values(text, table, inputs[:, layer].to(text.head.weight.dtype), layer)
            best.append(values.topk(min(k, values.shape[-1])).indices.cpu())
        parts.append(torch.stack(best))
    ids, places = torch.cat(parts, 1).unique(return_inverse=True)
    return PatchWords(layers, tuple(scores.word_of(i).strip() for i in ids.tolist()), places)


@without_autocast
def _values(text: TextModel, table: Tensor, vectors: Tensor, layer: int) -> Tensor:
    """Return the value of every word for vectors [tokens, d] at the input of a layer."""
    if layer == 0:
        return vectors.to(table.dtype) @ table.to(vectors.device).T
    return text.logits(text.norm(vectors))
