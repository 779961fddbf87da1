"""A check that the parts of a model compute what their weights say.

Scores are computed from the weights of the final norm, the unembedding and the output projections. A part that does
something else as well (an adapter that was not merged, a hook, a scale) would make the scores wrong without any sign of
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from .offload import device_of, weight_of
from .text_model import TextModel

_ROWS = 4
_WORDS = 8192  # rows of the unembedding that are converted to float64 at a time


@torch.inference_mode()
def check_parts(text: TextModel) -> None:
    """Run each part on random rows, and compare the result with the arithmetic of its weights.

    Raises:
        InputError: A part computes something else. The message has its name and the relative error.
    """
    parts = text.unembedding()
    draw = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(_ROWS, text.config.hidden_size, generator=draw)
    given = rows.to(device_of(text.norm), parts.weight.dtype)
    wide = given.double()
    normed = parts.centred(wide) * parts.scale(wide)[:, None]
    normed = normed if parts.gain is None else normed * parts.gain.double()
    normed = normed if parts.norm_bias is None else normed + parts.norm_bias.double()
    _compare("final norm", text.norm, text.norm(given), normed)

    hidden = given.to(device_of(text.head))
    logits = torch.cat([hidden.double() @ some.double().mT for some in parts.weight.split(_WORDS)], -1)
    _compare(
        "unembedding", text.head, text.head(hidden), logits if parts.bias is None else logits + parts.bias.double()
    )

    read_in = False
    for number, output in enumerate(text.outputs):
        if output.weight.device.type == "meta":  # check only one of the offloaded layers
            if read_in:
                continue
            read_in = True
        weight, bias = weight_of(output), output.bias
        found = torch.randn(_ROWS, weight.shape[1], generator=draw).to(device_of(output), weight.dtype)
        wanted = found.double() @ weight.to(found.device).double().mT
        wanted = wanted if bias is None or bias.device.type == "meta" else wanted + bias.double()
        _compare(f"output projection of layer {number}", output, output(found), wanted)


def _compare(name: str, module: Any, got: Tensor, wanted: Tensor) -> None:
    kind = type(module).__name__
    advice = (
        "scores are made from its weights. Merge adapters into the model (peft: model.merge_and_unload()), remove hooks"
        " from it, or use generate of transformers alone"
    )
    if hasattr(module, "base_layer"):  # refuse even an adapter that changes nothing yet: it may be trained later
        raise InputError(f"the {name} ({kind}) has an adapter that is not merged, and {advice}")
    if got.shape != wanted.shape:
        raise InputError(
            f"the {name} ({kind}) gives {tuple(got.shape)}, its weights {tuple(wanted.shape)}, and {advice}"
        )
    error = float((got.double() - wanted.to(got.device)).norm() / wanted.norm())
    if not error <= _allowed(got):
        raise InputError(
            f"the {name} ({kind}) computes something else than its weights say (by {error:.2g} of its output), and"
            f" {advice}"
        )


def _allowed(got: Tensor) -> float:
    """Return the relative error that rounding may cause, by the dtype or by products of lower precision."""
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps)  # norms of float64 work in float32
    if got.element_size() == 2:
        return 4 * eps
    if got.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 4 * torch.finfo(torch.bfloat16).eps
    return 64 * eps
