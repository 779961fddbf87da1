"""The explained sequence run again up to one row, for maps that need more than was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..knockout.plan import plan_of
from ..runtime.hooks import Weighing, model_lock, recording

if TYPE_CHECKING:
    from .explanation import Explanation


def hidden_states(ex: Explanation, stop: int, weighing: Weighing | None = None, embeds: Tensor | None = None) -> Tensor:
    """The final norm's output of the first `stop` positions, [stop, d], under the explanation's own knockouts.

    weighing: given each layer's attention, [1, H, stop, stop]; gradients flow only with it. embeds: in place of
    `input_embeddings`.
    """
    replay = ex.replay
    text = replay.text
    embeds = input_embeddings(ex, stop) if embeds is None else embeds
    plan = plan_of(replay.rules, [ex.layout], len(text.layers), device=embeds.device)
    with recording(text, knockouts=plan, backend=replay.backend, weighing=weighing):
        found = text.decoder(
            inputs_embeds=embeds[None],
            use_cache=False,
            **replay.arguments(0, stop),
        )
    return found.last_hidden_state[0]


@torch.inference_mode()
def layer_inputs(ex: Explanation, position: int) -> Tensor:
    """The residual vector at one position as each layer reads it, and behind the last layer: [L + 1, d]."""
    replay = ex.replay
    found: list[Tensor] = []
    take = lambda _, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0, position])  # noqa: E731
    modules = [*replay.text.layers, replay.text.norm]
    with model_lock(replay.text):  # another thread's pass would be taken too
        handles = [module.register_forward_pre_hook(take, with_kwargs=True) for module in modules]
        try:
            hidden_states(ex, position + 1)
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack(found)


def input_embeddings(ex: Explanation, stop: int) -> Tensor:
    """What the decoder reads at the first `stop` positions, [stop, d], image tokens included."""
    return ex.replay.embeds[0, :stop]


@contextmanager
def differentiable(ex: Explanation, stop: int) -> Iterator[Tensor]:
    """The input embeddings as a leaf [stop, d]: inside, gradients are on for it and off for the weights."""
    with model_lock(ex.replay.text), torch.inference_mode(False), torch.enable_grad():
        # what is read in layer by layer is another tensor each time
        weights = [weight for weight in _weights(ex) if weight.requires_grad and not weight.is_inference()]
        try:
            for weight in weights:
                weight.requires_grad_(False)
            yield input_embeddings(ex, stop).clone().requires_grad_()
        finally:
            for weight in weights:
                weight.requires_grad_(True)


def _weights(ex: Explanation) -> Iterator[Tensor]:
    yield from ex.replay.text.decoder.parameters()
    yield from ex.replay.text.head.parameters()
