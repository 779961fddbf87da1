"""A check that the parts of a model compute what their weights say.

Scores are computed from the weights of the final norm, the unembedding and the output projections. A part that does
something else as well (a hook, a scale) would make the scores wrong without any sign of it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, first_line
from ..core.split import Split, is_sharded, local
from .linears import compute_dtype, dequantised, device_of_linear, is_plain, weight_error
from .norms import allowed_error, relative_error
from .offload import weight_of
from .text_model import TextModel

_ROWS = 4
_WORDS = 8192  # rows of a weight that are converted to float64 at a time


@torch.no_grad()  # some quantised layers cannot run in inference mode
def check_parts(text: TextModel) -> None:
    """Run each part on random rows, and compare the result with the arithmetic of its weights.

    A warning says by how much quantised layers differ from their weights, because they round what they are given.

    Raises:
        InputError: A part computes something else. The message has its name and the relative error.
    """
    draw = torch.Generator().manual_seed(0)
    text.final_norm()
    split = text.split
    rounded = [_check_linear("unembedding", text.head, draw, None if split is None else split.my_words)]
    read_in = False
    for i, (site, output) in enumerate(zip(text.sites, text.outputs, strict=True)):
        text.post_norm(i)
        if output is None:
            continue
        if is_plain(output) and output.weight.device.type == "meta":  # check only one of the offloaded layers
            if read_in:
                continue
            read_in = True
        rounded.append(_check_linear(f"output projection of layer {site.layer}", output, draw, split=split))
    if max(rounded):
        warnings.warn(
            f"{sum(map(bool, rounded))} quantised layers round their inputs, by up to {max(rounded):.2g} of their"
            " output: scores are those of their weights, and differ by as much from what these layers add",
            stacklevel=2,
        )


def _check_linear(
    name: str, module: Any, draw: torch.Generator, words: range | None = None, split: Split | None = None
) -> float:
    """Compare a layer with its weight, or check that it is linear, if its weight is not known.

    Args:
        name: What the layer is, for messages.
        module: The layer.
        draw: Draws the rows that it is run on.
        words: The outputs whose weights this process holds, if the layer is divided by outputs.
        split: The ranks that the layer is divided over, if it is divided by inputs.

    Returns:
        By how much of its output a quantised layer differs from its weight, if that is more than rounding; else 0.
    """
    try:
        return _run_linear(name, module, draw, words, split)
    except RuntimeError as error:  # a quantised layer can raise anything
        raise InputError(f"the {name} ({type(module).__name__}) cannot be run: {first_line(error)}") from None


def _run_linear(name: str, module: Any, draw: torch.Generator, words: range | None, split: Split | None) -> float:
    rows = torch.randn(_ROWS, module.in_features, generator=draw)
    if is_sharded(getattr(module, "weight", None)):
        _run_divided(name, module, rows, words, split)
        return 0.0
    if not is_plain(module):
        rows = rows.to(device_of_linear(module), compute_dtype(module))
        stored = dequantised(module)
        if stored is not None:
            error = weight_error(module, stored)
            return error if error > 8 * allowed_error(rows) else 0.0
        zero, apart = module(torch.zeros_like(rows)), module(rows)
        # a layer of packed numbers may compute in bfloat16, whatever it is given
        packed = any(not tensor.is_floating_point() for tensor in (*module.parameters(), *module.buffers()))
        least = 4 * torch.finfo(torch.bfloat16).eps if packed else 0.0
        sums = (apart[:1] + apart[1:2] - zero[:1]).double()
        _compare(name, module, module(rows[:1] + rows[1:2]), sums, 8, least)
        return 0.0
    weight, bias = weight_of(module), module.bias
    given = rows.to(device_of_linear(module), weight.dtype)
    wanted = torch.cat([given.double() @ some.to(given.device).double().mT for some in weight.split(_WORDS)], -1)
    wanted = wanted if bias is None or bias.device.type == "meta" else wanted + bias.double()
    _compare(name, module, module(given), wanted)
    return 0.0


def _run_divided(name: str, module: Any, rows: Tensor, words: range | None, split: Split | None) -> None:
    """Compare a layer that is divided between processes with the weights of all of them."""
    weight, bias = weight_of(module), local(module.bias)
    given = rows.to(weight.device, weight.dtype)
    if split is not None:  # each rank has some inputs, and gives all outputs
        given = given[:, split.rank * weight.shape[1] :][:, : weight.shape[1]]
        wanted = split.sum(given.double() @ weight.double().mT)
        got = module(given)
    else:
        assert words is not None
        wanted, got = given.double() @ weight.double().mT, module(given)[:, words.start : words.stop]
    _compare(name, module, got, wanted if bias is None else wanted + bias.double())


def _compare(name: str, module: Any, got: Tensor, wanted: Tensor, margin: int = 1, least: float = 0) -> None:
    kind = type(module).__name__
    advice = "scores are made from its weights. Remove hooks from it, or use generate of transformers alone"
    if got.shape != wanted.shape:
        raise InputError(
            f"the {name} ({kind}) gives {tuple(got.shape)}, its weights {tuple(wanted.shape)}, and {advice}"
        )
    error = relative_error(got, wanted)
    if not error <= max(margin * allowed_error(got), least):
        raise InputError(
            f"the {name} ({kind}) computes something else than its weights say (by {error:.2g} of its output), and"
            f" {advice}"
        )
