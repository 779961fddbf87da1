"""The explained sequence run again, for methods that need more than was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..knockout.plan import plan_of
from ..knockout.rule import Knockout
from ..models.text_model import TextModel
from ..runtime.hooks import OnWeights, Recording, model_lock, recording


class Replay:
    """What is needed to run an explained sequence, or its end, again: what each pass gave the decoder, and the
    knockouts that were in force."""

    def __init__(
        self, text: TextModel, record: Recording, layout: TokenLayout, rules: tuple[Knockout, ...], backend: str
    ):
        self.text = text
        self.layout = layout
        self.rules = rules
        self.backend = backend
        self.embeds = torch.cat(record.embeds, 1)  # [1, N, d]
        given = [p for p in record.positions if p is not None]
        self.positions = torch.cat(given, -1) if len(given) == len(record.positions) else None  # [..., 1, N]
        self._others = [(embeds.shape[:2], others) for embeds, others in zip(record.embeds, record.others, strict=True)]

    def arguments(self, start: int, stop: int, count: int = 1) -> dict[str, Any]:
        """What the decoder was given at positions `start` .. `stop`, beside embeddings and cache, for `count` copies of
        the sequence.

        Raises:
            InputError: an argument has not one entry a position, and so cannot be cut; or not every pass had it.
        """
        span = slice(start, stop)
        found: dict[str, Any] = {"attention_mask": None, "position_ids": None}
        if self.positions is not None:
            positions = self.positions[..., span]
            found["position_ids"] = positions.expand(*positions.shape[:-2], count, -1)
        for name, whole in self._whole.items():
            found[name] = whole[:, span].expand(count, *[-1] * (whole.ndim - 1))
        return found

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """The further arguments of all passes, each [1, N, ...]."""
        names = dict.fromkeys(name for _, others in self._others for name in others)
        return {name: self._joined(name) for name in names if not (name == "attention_mask" and self._sees_all())}

    def _joined(self, name: str) -> Tensor:
        parts = []
        for shape, others in self._others:
            part = others.get(name)
            # a mask's second side are the keys; a position has no part of it
            if name == "attention_mask" or not isinstance(part, Tensor) or part.shape[:2] != shape:
                raise InputError(
                    f"the model's decoder was given {name!r}, which cannot be given again for a part of the sequence:"
                    " maps and checks that run the model again cannot be made for this model or these options; those"
                    ' read from the cache can (heatmap methods "logprob" and "attention")'
                )
            parts.append(part)
        return torch.cat(parts, 1)

    def _sees_all(self) -> bool:
        """Whether the masks that were given close nothing, as for one sequence without padding."""
        masks = [others.get("attention_mask") for _, others in self._others]
        return all(mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all())) for mask in masks)

    def hidden_states(self, stop: int, on_weights: OnWeights | None = None, embeds: Tensor | None = None) -> Tensor:
        """The final norm's output of the first `stop` positions, [stop, d], under the explanation's own knockouts.

        Args:
            stop: how many positions are run.
            on_weights: called with each layer's number and attention weights, [1, H, stop, stop]; gradients flow only
                where it is given.
            embeds: input embeddings [stop, d] in place of those that were recorded.
        """
        text = self.text
        embeds = self.embeds[0, :stop] if embeds is None else embeds
        plan = plan_of(self.rules, [self.layout], len(text.layers), device=embeds.device)
        with recording(text, knockouts=plan, backend=self.backend, on_weights=on_weights):
            found = text.decoder(inputs_embeds=embeds[None], use_cache=False, **self.arguments(0, stop))
        return found.last_hidden_state[0]

    @torch.inference_mode()
    def layer_inputs(self, position: int) -> Tensor:
        """The residual vector at one position as each layer reads it, and behind the last layer: [L + 1, d]."""
        found: list[Tensor] = []
        take = lambda _, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0, position])  # noqa: E731
        modules = [*self.text.layers, self.text.norm]
        with model_lock(self.text):  # another thread's pass would be taken too
            handles = [module.register_forward_pre_hook(take, with_kwargs=True) for module in modules]
            try:
                self.hidden_states(position + 1)
            finally:
                for handle in handles:
                    handle.remove()
        return torch.stack(found)

    @contextmanager
    def differentiable(self, stop: int) -> Iterator[Tensor]:
        """The input embeddings as a leaf [stop, d]: inside, gradients are on for it and off for the weights."""
        with model_lock(self.text), torch.inference_mode(False), torch.enable_grad():
            # what is read in layer by layer is another tensor each time
            parameters = (*self.text.decoder.parameters(), *self.text.head.parameters())
            weights = [weight for weight in parameters if weight.requires_grad and not weight.is_inference()]
            try:
                for weight in weights:
                    weight.requires_grad_(False)
                yield self.embeds[0, :stop].clone().requires_grad_()
            finally:
                for weight in weights:
                    weight.requires_grad_(True)
