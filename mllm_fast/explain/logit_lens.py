"""The logit lens: projects a vector of the residual stream into the unembedding or embedding space.

See arXiv 2411.10950, sections 3 and 4. Any vector can be read: the input of a layer, what attention or MLP add to it,
and what a head writes, at the answer's tokens or at any other position, image tokens included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import InputError, check_choice
from ..core.split import is_sharded, shares
from ..kernels import wide_type, without_autocast
from ..models.offload import weight_of
from .scores import Scores

SPACES = ("unembedding", "embedding")
PARTS = ("residual", "attention", "mlp")
NORMS = ("own", "frozen", "none")


class Place(NamedTuple):
    """Which vector is read.

    Attributes:
        token: The index of the answer's token whose row it belongs to.
        layer: The layer. Of the residual stream it is the layer's input; the number of layers stands for the output of
            the last one.
        part: The head, or "residual", "attention" (what the layer's attention adds) or "mlp" (what its MLP adds).
        position: A position before the row. Of a head it is the position from which it writes to the token's row. Of
            the other parts it is where the vector is, in place of the token's row.
    """

    token: int
    layer: int
    part: int | str = "residual"
    position: int | None = None


@torch.no_grad()
def project(scores: Scores, place: Place, space: str, norm: str | None, k: int) -> list[tuple[str, float]]:
    """See `Explanation.project`."""
    if k < 1:
        raise InputError(f"k is at least 1, got {k}")
    values = values_at(scores, place, space, norm).float().cpu()
    best = values.topk(min(k, len(values)))
    return [(scores.word_of(i), value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@torch.no_grad()
def ranks(scores: Scores, place: Place, ids: Sequence[int], space: str, norm: str | None) -> list[tuple[int, float]]:
    """Return the rank among all words, from 1 on, and the value of each of some token ids; see `Explanation.ranks`."""
    values = values_at(scores, place, space, norm)
    return [(1 + int((values > values[i]).sum()), float(values[i])) for i in ids]


def values_at(scores: Scores, place: Place, space: str, norm: str | None) -> Tensor:
    """Return the value of every word for the vector at a place, float32 [V]; see `word_values`."""
    check_choice("space", space, SPACES)
    if norm is not None:
        check_choice("final_norm", norm, NORMS)
    is_write = place.part != "residual"
    return word_values(scores, place.token, vector_at(scores, place), space, is_write, norm)


def vector_at(scores: Scores, place: Place) -> Tensor:
    """Return the vector at a place, [d].

    Raises:
        InputError: There is no such layer, head or position, or the explanation cannot run the model again.
    """
    token, layer, part, position = place
    last = scores.num_layers - (part != "residual")
    if isinstance(part, str) and part not in PARTS:
        raise InputError(f"head is a number, or one of {', '.join(PARTS)}, got {part!r}")
    if not 0 <= layer <= last:
        behind = " (behind the last)" if part == "residual" else ""
        raise InputError(f"layer is 0 to {last}{behind}, got {layer}")
    row = scores.trace.rows[token]
    if not isinstance(part, str):
        if not 0 <= part < scores.num_heads:
            raise InputError(f"head is 0 to {scores.num_heads - 1}, got {part}")
        return write_of(scores, token, layer, part, position)
    if position is not None and not 0 <= position <= row:
        raise InputError(f"position is 0 to {row}, those that the token sees, got {position}")
    if part != "residual":
        return scores.replay.added(layer, row if position is None else position)[PARTS.index(part) - 1]
    if position is None or position == row:
        trace = scores.trace
        return trace.final[token] if layer == scores.num_layers else trace.residual[token, layer]
    return scores.replay.layer_inputs(position)[layer]


@without_autocast
def write_of(scores: Scores, token: int, layer: int, head: int, position: int | None) -> Tensor:
    """Return what a head writes to the residual stream at a token's row, whole or from one position, [d]."""
    trace, site = scores.trace, scores.text_model.site(layer)
    text, column = scores.text_model, position
    if position is not None:
        if trace.positions is not None:
            held = (trace.positions[site] == position).nonzero()
            column = int(held) if len(held) else -1
        if not 0 <= column <= trace.rows[token]:  # type: ignore[operator]
            raise InputError(f"position {position} is not among those that the token sees in layer {layer}")
    written = []
    if head in text.heads:
        here = head - text.heads.start
        whole = column is None
        value = trace.output[token, site, here] if whole else trace.position_values(token, [(site, here)])[0, column]
        written.append(text.projection(site, here).to(value) @ value)
    if text.split is not None:
        dtype = trace.output.dtype if position is None else wide_type(trace.query.dtype)
        like = torch.empty(text.width, dtype=dtype, device=trace.residual.device)
        written = text.split.from_owners([[one.to(like)] for one in written], [head], [like])[0]
    write = written[0]
    return write if trace.write_scale is None else write * trace.write_scale[token, site].to(write)


@torch.no_grad()
@without_autocast
def word_values(
    scores: Scores, token: int, vector: Tensor, space: str, write: bool = False, norm: str | None = None
) -> Tensor:
    """Return the value of every word for a vector, by which `project` ranks the words.

    Args:
        scores: the explanation.
        token: the token's index.
        vector: the vector [d].
        space: "unembedding" or "embedding".
        write: whether the vector is a write, which is added to a residual vector, and not a residual vector itself.
        norm: what the final norm does in the unembedding space. "own" takes the vector's own statistics, and gives
            log-probabilities. "frozen" takes those of the token's final row, and gives what the vector adds to the
            logits (equation 7). "none" leaves the norm out. By default it is "frozen" for a write and "own" else.

    Returns:
        float32 [V], as precise as the model.
    """
    text = scores.text_model
    if space == "embedding":
        embedding = text.decoder.get_input_embeddings()  # type: ignore[operator]
        table = weight_of(embedding)
        return _of_words(scores, (table.to(vector.device) @ vector.to(table.dtype)).float(), embedding)
    norm = norm or ("frozen" if write else "own")
    if norm == "own":
        return torch.log_softmax(text.logits(text.norm(vector.to(text.head.weight.dtype))).float(), -1)  # type: ignore[arg-type]
    if norm == "none":
        return text.head(vector.to(text.head.weight.dtype)).float()
    unembedding, final = scores.unembedding, scores.trace.final[token].float()
    found = unembedding.times((unembedding.centred(vector.float()) * unembedding.scale(final))[:, None])[:, 0]
    return _of_words(scores, found, text.head)


def _of_words(scores: Scores, values: Tensor, table: Any) -> Tensor:
    """Return a value of every word of a table, for those of the words that this process holds."""
    split = scores.text_model.split
    if split is None or not is_sharded(table.weight):
        return values
    return split.gather(values, 0, shares(len(table.weight), split.size))
