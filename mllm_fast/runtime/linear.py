"""Context manager that runs a model's large linear layers on `skinny_linear`.

Inside `with skinny_linears(text)` the large linear layers of the text part, the head included, compute on
`skinny_linear`. A decoding step reads every weight, and torch reads them at half of the memory's speed. When the block
ends, also by an exception, the layers are restored. No other module touches transformers' linear layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import skinny_linear, worth_reading
from ..models.text_model import TextModel

_found: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Linear]]] = weakref.WeakKeyDictionary()


@contextmanager
def skinny_linears(text: TextModel, backend: str = "auto") -> Iterator[None]:
    """Run the large linear layers of a model on `skinny_linear` inside the block.

    It is for one thread at a time, which `hooks.model_lock` ensures.

    Args:
        text: The text part of the model.
        backend: The backend, as for the attention. "torch" and "triton" leave the layers unchanged.
    """
    changed = []
    if backend in ("auto", "cpu"):
        for layer in _large(text):
            if "forward" not in vars(layer):  # a layer that someone else patched stays as it is
                vars(layer)["forward"] = partial(skinny_forward, layer)
                changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


def skinny_forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """Compute a linear layer on `skinny_linear`, unless it has to be torch's own."""
    if (
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()  # a compiled model has its own linear layers
        or type(layer.weight) is not nn.Parameter  # a quantised weight, say
    ):
        return F.linear(input, layer.weight, layer.bias)
    return skinny_linear(input, layer.weight, layer.bias)


def _large(text: TextModel) -> list[nn.Linear]:
    """Return the large linear layers, found once a model: in a small one the search takes as long as a layer."""
    known = _found.get(text.decoder)
    if known is None:
        layers = [one for one in (*text.decoder.modules(), text.head) if type(one) is nn.Linear]
        known = _found[text.decoder] = [weakref.ref(one) for one in layers if worth_reading(one.weight)]
    return [layer for ref in known if (layer := ref()) is not None]
