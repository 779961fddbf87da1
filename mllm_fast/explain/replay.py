"""Run an explained sequence again, for methods that need more than was recorded."""

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
    """Runs an explained sequence, or its end, again.

    It keeps the decoder's inputs in each recorded forward pass and the knockouts that applied.

    Attributes:
        text: the text part of the model.
        layout: the layout of the whole sequence.
        rules: the knockout rules that applied.
        backend: the backend of the kernels.
        embeds: the input embeddings, [1, N, d].
        positions: the position ids, [..., 1, N], or None if a pass had none.
    """

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
        """Return the decoder's arguments for a range of positions, except the embeddings and the cache.

        Args:
            start: the first position.
            stop: the position after the last.
            count: how many copies of the sequence are run.

        Raises:
            InputError: an argument cannot be cut, as it does not have one entry per position, or a pass did not have
                it.
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
        """The further arguments of all passes, joined over the sequence, each [1, N, ...]."""
        names = dict.fromkeys(name for _, others in self._others for name in others)
        return {name: self._joined(name) for name in names if not (name == "attention_mask" and self._sees_all())}

    def _joined(self, name: str) -> Tensor:
        parts = []
        for shape, others in self._others:
            part = others.get(name)
            # a mask's second dimension are the keys, so it cannot be cut by position
            if name == "attention_mask" or not isinstance(part, Tensor) or part.shape[:2] != shape:
                raise InputError(
                    f"the model's decoder was given {name!r}, which cannot be given again for a part of the sequence:"
                    " maps and checks that run the model again cannot be made for this model or these options; those"
                    ' read from the cache can (heatmap methods "logprob" and "attention")'
                )
            parts.append(part)
        return torch.cat(parts, 1)

    def _sees_all(self) -> bool:
        """Return whether the recorded masks hide nothing, as for one sequence without padding."""
        masks = [others.get("attention_mask") for _, others in self._others]
        return all(mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all())) for mask in masks)

    def hidden_states(self, stop: int, on_weights: OnWeights | None = None, embeds: Tensor | None = None) -> Tensor:
        """Return the final norm's output at the first `stop` positions, under the knockouts of the explanation.

        Args:
            stop: how many positions are run.
            on_weights: called with each layer's index and attention weights, [1, H, stop, stop]. Gradients flow only if
                it is given.
            embeds: input embeddings [stop, d] to use in place of the recorded ones.

        Returns:
            [stop, d].
        """
        text = self.text
        embeds = self.embeds[0, :stop] if embeds is None else embeds
        plan = plan_of(self.rules, [self.layout], len(text.layers), device=embeds.device)
        with recording(text, knockouts=plan, backend=self.backend, on_weights=on_weights):
            found = text.decoder(inputs_embeds=embeds[None], use_cache=False, **self.arguments(0, stop))
        return found.last_hidden_state[0]

    @torch.inference_mode()
    def layer_inputs(self, position: int) -> Tensor:
        """Return the residual vector at one position before each layer and after the last one, [L + 1, d]."""
        found: list[Tensor] = []
        take = lambda _, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0, position])  # noqa: E731
        modules = [*self.text.layers, self.text.norm]
        with model_lock(self.text):  # the hooks would also catch another thread's pass
            handles = [module.register_forward_pre_hook(take, with_kwargs=True) for module in modules]
            try:
                self.hidden_states(position + 1)
            finally:
                for handle in handles:
                    handle.remove()
        return torch.stack(found)

    @contextmanager
    def differentiable(self, stop: int) -> Iterator[Tensor]:
        """Yield the input embeddings as a leaf tensor [stop, d] that requires gradients.

        Inside the block gradients are enabled for this tensor and disabled for the weights.
        """
        with model_lock(self.text), torch.inference_mode(False), torch.enable_grad():
            # list the weights once: an offloaded weight is a new tensor each time it is loaded
            parameters = (*self.text.decoder.parameters(), *self.text.head.parameters())
            weights = [weight for weight in parameters if weight.requires_grad and not weight.is_inference()]
            try:
                for weight in weights:
                    weight.requires_grad_(False)
                yield self.embeds[0, :stop].clone().requires_grad_()
            finally:
                for weight in weights:
                    weight.requires_grad_(True)
