"""The logit lens: projects a recorded vector into the unembedding or embedding space (arXiv 2411.10950, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InputError, check_choice
from ..models.offload import weight_of
from .scores import Scores

SPACES = ("unembedding", "embedding")


@torch.no_grad()
def project(
    scores: Scores, token: int, layer: int, head: int | None, position: int | None, space: str, k: int
) -> list[tuple[str, float]]:
    """See `Explanation.project`."""
    check_choice("space", space, SPACES)
    if not 0 <= layer <= scores.num_layers - (head is not None):
        last = f"{scores.num_layers - 1}" if head is not None else f"{scores.num_layers} (behind the last)"
        raise InputError(f"layer is 0 to {last}, got {layer}")
    if head is not None and not 0 <= head < scores.num_heads:
        raise InputError(f"head is 0 to {scores.num_heads - 1}, got {head}")
    if position is not None and head is None:
        raise InputError("a position's write is a head's: give the head too")
    if k < 1:
        raise InputError(f"k is at least 1, got {k}")
    vector = write_of(scores, token, layer, head, position) if head is not None else _residual(scores, token, layer)
    values = word_values(scores, token, vector, space, head is not None).float().cpu()
    best = values.topk(min(k, len(values)))
    return [(scores.decode([i]), value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _residual(scores: Scores, token: int, layer: int) -> Tensor:
    trace = scores.trace
    return trace.final[token] if layer == scores.num_layers else trace.residual[token, layer]


def write_of(scores: Scores, token: int, layer: int, head: int, position: int | None) -> Tensor:
    """Return what a head writes to the residual stream at a token's row, whole or from one position, [d]."""
    trace, site = scores.trace, scores.text_model.site(layer)
    if position is None:
        value = trace.output[token, site, head]
    else:
        column = position
        if trace.positions is not None:
            held = (trace.positions[site] == position).nonzero()
            column = int(held) if len(held) else -1
        values = trace.position_values(token, [(site, head)])[0]
        if not 0 <= column < len(values):
            raise InputError(f"position {position} is not among those that the token sees in layer {layer}")
        value = values[column]
    write = scores.text_model.projection(site, head).to(value) @ value
    return write if trace.write_scale is None else write * trace.write_scale[token, site].to(write)


@torch.no_grad()
def word_values(scores: Scores, token: int, vector: Tensor, space: str, write: bool = False) -> Tensor:
    """Return the value of every word for a vector, by which `project` ranks the words.

    Args:
        scores: the explanation.
        token: the token's index.
        vector: the vector [d].
        space: "unembedding" or "embedding".
        write: whether the vector is a write, which is added to a residual vector, and not a residual vector itself.

    Returns:
        float32 [V], as precise as the model.
    """
    text = scores.text_model
    if space == "embedding":
        table = weight_of(text.decoder.get_input_embeddings())  # type: ignore[operator]
        return (table.to(vector.device) @ vector.to(table.dtype)).float()
    if not write:
        return torch.log_softmax(text.logits(text.norm(vector.to(text.head.weight.dtype))).float(), -1)  # type: ignore[arg-type]
    unembedding, final = scores.unembedding, scores.trace.final[token].float()
    return unembedding.times((unembedding.centred(vector.float()) * unembedding.scale(final))[:, None])[:, 0]
