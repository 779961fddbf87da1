"""Norms and dot products of the gradients of all class logits, from the structure of the detector's last layer.

The logit z_m of box m depends only on row m and on the class row (row 0) of the last layer's output. The heads, the
norms and the MLP act on each row alone. The gradient of z_m at the output of the attention block is therefore a pair of
vectors: r_m at row m and r_m0 at row 0. From there it reaches another token n only through the attention of these two
rows, as a sum over heads h and rows i in {m, 0}:

    A_in W_V^T t_i  +  A_in (t_i . (v_n - o_i)) s W_K^T q_i,        t_i = W_O^T r_i

The norm of this sum at n follows from a Gram matrix of 4 vectors per head. The backward pass of the input norm takes
two more dot products. The numerators <dz_m/dE, g> are the forward-mode derivative of the attention block along g,
dotted with r_m and r_m0.

No box needs a backward pass of its own. All 576 boxes of OWL-ViT base take about 30 GFLOP, and a single backward pass
takes 9 GFLOP.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .detector import Detector

_ELEMENTS = 1 << 20  # elements of the largest array per step, so that it stays in the cache of a CPU core


class Products(NamedTuple):
    """The dot product and the norm of the gradient of each box.

    Attributes:
        dots: <dz_m/dE, g>, [boxes].
        norms: ||dz_m/dE||, [boxes].
    """

    dots: Tensor
    norms: Tensor


def has_known_form(detector: Detector) -> bool:
    """Return whether the detector has the structure that this module relies on.

    It has this structure if its parts are transformers' own classes. A subclass, an adapter or a hook changes the
    structure.
    """
    from transformers.models.owlv2 import modeling_owlv2
    from transformers.models.owlvit import modeling_owlvit

    layer, model = detector.last_layer, detector.model
    for module, name in ((modeling_owlvit, "OwlViT"), (modeling_owlv2, "Owlv2")):
        kinds = {
            model: f"{name}ForObjectDetection",
            model.class_head: f"{name}ClassPredictionHead",
            layer: f"{name}EncoderLayer",
            layer.self_attn: f"{name}Attention",
            layer.mlp: f"{name}MLP",
        }
        if all(type(part) is getattr(module, kind) for part, kind in kinds.items()):
            linear = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.out_proj]
            plain = all(type(part) is torch.nn.Linear for part in linear)
            plain = plain and type(layer.layer_norm1) is torch.nn.LayerNorm
            parts = [*layer.modules(), *model.class_head.modules()]
            return plain and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    return False


def structured(detector: Detector, tokens: Tensor, query: Tensor, direction: Tensor) -> Products:
    """Compute the products from the structure of the last layer, without a backward pass per box.

    Args:
        detector: A detector for which `has_known_form` is true.
        tokens: The vision embedding E, [1 + n, d].
        query: One embedded query, [d_text].
        direction: The direction g, [1 + n, d].
    """
    block = _Attention(detector.last_layer, tokens)
    rows = _gradients(detector, block.output, query)  # [n, 2, d]
    tangent = block.tangent(direction)
    dots = (rows[:, 0] * tangent[1:]).sum(-1) + rows[:, 1] @ tangent[0]
    step = max(1, _ELEMENTS // (len(tokens) * 4 * block.heads))
    squares = [block.squares(start, rows[start : start + step]) for start in range(0, len(rows), step)]
    return Products(dots, torch.cat(squares).clamp_min(0).sqrt())


def _gradients(detector: Detector, attended: Tensor, query: Tensor) -> Tensor:
    """Return the gradient of z_m at the output of the attention block, at row m and at row 0, [n, 2, d]."""
    layer = detector.last_layer

    def rest(hidden: Tensor) -> Tensor:
        return hidden + layer.mlp(layer.layer_norm2(hidden))

    with torch.enable_grad():
        patches = attended[1:].detach().requires_grad_()
        first = attended[:1].detach().requires_grad_()
        ends = rest(patches)
        # each z_m takes its own copy of the class row, so that one backward pass gives the gradients of all boxes
        end = rest(first)
        copies = end.detach().expand(len(ends), -1).clone().requires_grad_()
        leaves = ends.detach().requires_grad_()
        logits = detector.logits(detector.merge(leaves[:, None], copies[:, None]), query[None])
        own, common = torch.autograd.grad(logits.sum(), [leaves, copies])
        (own,) = torch.autograd.grad(ends, patches, own)
        # one vector-Jacobian product per box, each for a single row: together they are a matrix product
        (common,) = torch.autograd.grad(end, first, common[:, None], is_grads_batched=True)
    return torch.stack([own, common[:, 0]], 1)


class _Attention:
    """The attention block of the last layer, with its norm and its residual connection, at E = `hidden` [N, d].

    Attributes:
        q, k, v: Queries, keys and values, [H, N, dh]. The queries are scaled.
        unit: Input of the norm, scaled to mean 0 and deviation 1, [N, d].
        mixed: Values weighted by the attention weights, [H, N, dh].
    """

    def __init__(self, layer: Any, hidden: Tensor):
        attention, norm = layer.self_attn, layer.layer_norm1
        self.heads, self.scale = attention.num_heads, attention.scale
        self.gain, self.out = norm.weight.detach(), attention.out_proj.weight.detach()
        self.weights = [part.weight.detach() for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        biases = [part.bias.detach() for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        variance = hidden.var(-1, correction=0)
        self.deviation = (variance + norm.eps).sqrt()
        self.unit = (hidden - hidden.mean(-1, keepdim=True)) / self.deviation[:, None]
        self.share = variance / (variance + norm.eps)  # ||unit||^2 / d
        shift = norm.bias.detach()
        normed = self.unit * self.gain + shift
        self.q, self.k, self.v = (
            self._split(normed @ weight.T + bias) for weight, bias in zip(self.weights, biases, strict=True)
        )
        self.q = self.q * self.scale
        # the part of keys and values that does not depend on `unit`: [H, dh]
        self.key_shift, self.value_shift = (
            (weight @ shift + bias).unflatten(0, (self.heads, -1))
            for weight, bias in zip(self.weights[1:], biases[1:], strict=True)
        )
        # weights multiplied by the norm's gain, by head: [H, dh, d]
        self.weight_q, self.weight_k, self.weight_v = (
            (weight * self.gain).unflatten(0, (self.heads, -1)) for weight in self.weights
        )
        self.alpha = torch.softmax(self.q @ self.k.mT, -1)  # [H, N, N]
        self.mixed = self.alpha @ self.v
        self.output = hidden + self._joined(self.mixed) @ self.out.T + attention.out_proj.bias.detach()

    def _split(self, rows: Tensor) -> Tensor:
        """Split the last dimension into heads: [..., d] -> [H, ..., dh]."""
        return rows.unflatten(-1, (self.heads, -1)).movedim(-2, 0)

    def _joined(self, heads: Tensor) -> Tensor:
        return heads.movedim(0, -2).flatten(-2)

    def tangent(self, direction: Tensor) -> Tensor:
        """Return the derivative of the block's output along a direction, [N, d]."""
        size = direction.shape[-1]
        along = (direction * self.unit).sum(-1, keepdim=True) / size
        unit = (direction - direction.mean(-1, keepdim=True) - self.unit * along) / self.deviation[:, None]
        normed = unit * self.gain
        q, k, v = (self._split(normed @ weight.T) for weight in self.weights)
        scores = (q * self.scale) @ self.k.mT + self.q @ k.mT
        change = self.alpha * (scores - (self.alpha * scores).sum(-1, keepdim=True))
        return direction + self._joined(change @ self.v + self.alpha @ v) @ self.out.T

    def squares(self, start: int, rows: Tensor) -> Tensor:
        """Return ||dz_m/dE||^2 of the boxes from `start` on, given their gradients `rows` [M, 2, d].

        Box m is token m + 1. All arrays have pairs (row m, row 0) and heads before tokens, so that the innermost reads
        are contiguous.
        """
        heads, size, own = self.heads, rows.shape[-1], slice(start + 1, start + 1 + len(rows))
        ends = (rows @ self.out).unflatten(-1, (heads, -1))  # t: [M, 2, H, dh]
        queries = self._pairs(self.q, own)
        # alpha: attention weights of row m and of row 0; bent: gradient at their scores; [M, 2, H, N] each
        parts = rows.new_empty(len(rows), 4, heads, len(self.unit))
        alpha, bent = parts[:, :2], parts[:, 2:]
        alpha.copy_(self._pairs(self.alpha, own))
        read = self._by_head(ends, self.v.mT)  # t . v_n
        torch.mul(alpha, read - (ends * self._pairs(self.mixed, own)).sum(-1, keepdim=True), out=bent)
        spans = torch.cat([self._by_head(ends, self.weight_v), self._by_head(queries, self.weight_k)], 1)
        spans, parts = spans.flatten(1, 2), parts.flatten(1, 2)  # [M, 4 H, d], [M, 4 H, N]
        # w_n, the gradient at `unit`, is a sum of `spans` weighted by `parts`
        # the backward pass of the norm needs |w|^2, w . 1 and w . unit
        square = ((spans @ spans.mT @ parts) * parts).sum(1)
        total = (spans.sum(-1)[:, None] @ parts)[:, 0]
        pull = alpha * (read - (ends * self.value_shift).sum(-1, keepdim=True))
        scores = self._by_head(queries, self.k.mT) - (queries * self.key_shift).sum(-1, keepdim=True)
        pull = pull.addcmul_(bent, scores).sum((1, 2))
        square = square - total**2 / size - pull**2 / size * (2 - self.share)
        square = square / self.deviation**2
        # at row m and at row 0, the queries and the residual connection add to the gradient
        index = torch.arange(start + 1, start + 1 + len(rows), device=rows.device)
        index = torch.stack([index, torch.zeros_like(index)], 1)  # [M, 2]
        square = square.scatter(1, index, 0.0).sum(1)
        asked = self._by_head(self._by_head(bent, self.k), self.weight_q).sum(2) * self.scale  # [M, 2, d]
        here = parts.gather(2, index[:, None].expand(-1, parts.shape[1], -1)).mT @ spans + asked
        unit, deviation = self.unit[index], self.deviation[index][..., None]
        along = (here * unit).mean(-1, keepdim=True)
        here = (here - here.mean(-1, keepdim=True) - unit * along) / deviation + rows
        return square + here.square().sum((1, 2))

    def _pairs(self, values: Tensor, own: slice) -> Tensor:
        """Collect the values of row m and of row 0: [H, N, ...] -> [M, 2, H, ...]."""
        of_own = values[:, own].transpose(0, 1)
        return torch.stack([of_own, values[:, 0].expand_as(of_own)], 1)

    def _by_head(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Multiply [M, 2, H, a] by [H, a, b] head by head: [M, 2, H, b]."""
        flat = rows.flatten(0, 1).transpose(0, 1)
        return (flat @ matrices).transpose(0, 1).unflatten(0, rows.shape[:2])


def row_by_row(detector: Detector, tokens: Tensor, query: Tensor, direction: Tensor, batch: int = 4) -> Products:
    """Compute the products of `structured` by backward passes, `batch` boxes at a time, for a detector of any form."""
    with torch.enable_grad():
        leaf = tokens.detach().clone().requires_grad_()
        logits = detector.logits(detector.features(leaf), query[None])[:, 0]
        each = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
        dots, squares = [], []
        for start in range(0, len(logits), batch):
            (rows,) = torch.autograd.grad(
                logits, leaf, each[start : start + batch], retain_graph=True, is_grads_batched=True
            )
            dots.append((rows * direction).sum((1, 2)))
            squares.append(rows.square().sum((1, 2)))
    return Products(torch.cat(dots), torch.cat(squares).sqrt())


def cosines(products: Products, direction: Tensor) -> Tensor:
    """Return cos(dz_m/dE, g) of each box, [boxes]; it is 0 where a gradient vanishes."""
    scale = products.norms * math.sqrt(float(direction.double().square().sum()))
    return torch.where(scale > 0, products.dots / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)
