"""Run an explained sequence again, for methods that need more than was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, first_line
from ..core.layout import TokenLayout
from ..knockout.plan import plan_of
from ..knockout.rule import Knockout
from ..models.text_model import TextModel
from ..runtime.attention import seen_by
from ..runtime.hooks import model_lock, recording
from ..runtime.interception import OnWeights
from ..runtime.record import Recording
from ..runtime.row_mask import RowMask


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
        self._inputs: tuple[int, Tensor] | None = None  # of the last position that was asked for
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
        found: dict[str, Any] = {"attention_mask": self._mask(start, stop, count), "position_ids": None}
        if self.positions is not None:
            positions = self.positions[..., span]
            found["position_ids"] = positions.expand(*positions.shape[:-2], count, -1)
        for name, whole in self._whole.items():
            found[name] = _usable(whole[:, span].expand(count, *[-1] * (whole.ndim - 1)))
        for name, (mask, parts) in self._of_marked.items():
            some = slice(int(self._whole[mask][0, :start].sum()), int(self._whole[mask][0, :stop].sum()))
            found[name] = [_usable(part[some].repeat(count, 1)) for part in parts]
        return found

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """The further arguments of all passes, joined over the sequence, each [1, N, ...]."""
        names = dict.fromkeys(name for _, others in self._others for name in others)
        return {name: self._joined(name) for name in names if name != "attention_mask" and name not in self._of_marked}

    def _joined(self, name: str) -> Tensor:
        parts, marks = [], {mask for mask, _ in self._of_marked.values()}
        for shape, others in self._others:
            part = others.get(name)
            if part is None and name in marks:  # a pass that reads no image marks nothing
                part = torch.zeros(shape, dtype=torch.bool, device=self.embeds.device)
            if not isinstance(part, Tensor) or part.shape[:2] != shape:
                raise _cannot_be_cut(name)
            parts.append(part)
        return torch.cat(parts, 1)

    @cached_property
    def _of_marked(self) -> dict[str, tuple[str, list[Tensor]]]:
        """The arguments with one row for each position that another argument marks, by name.

        Qwen3-VL gives its decoder features that are added between layers (DeepStack), a list of [n, d], and a mask
        bool [1, N] of the n positions that they belong to. The values are the name of the mask, and the features.
        """
        found: dict[str, tuple[str, list[Tensor]]] = {}
        for shape, others in self._others:
            masks = {name: mask for name, mask in others.items() if _is_mask(mask, shape)}
            for name, parts in others.items():
                if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Tensor) for part in parts):
                    continue
                fits = [key for key, mask in masks.items() if all(len(part) == int(mask.sum()) for part in parts)]
                if len(fits) != 1 or name in found:  # two passes with images: which rows are whose is not known
                    raise _cannot_be_cut(name)
                found[name] = fits[0], list(parts)
        return found

    def _mask(self, start: int, stop: int, count: int) -> Any:
        """Return the attention mask of a range of positions in the form that the decoder got it, or None."""
        if self._masks is None:
            return None
        cut = {
            name: whole[None, None, start:stop, :stop].expand(count, -1, -1, -1) for name, whole in self._masks.items()
        }
        return cut.get("", cut)

    @cached_property
    def _masks(self) -> dict[str, Tensor] | None:
        """Which keys each row sees, bool [N, N] by kind of layer, or None if the decoder makes its own masks.

        The key "" stands for one mask for all layers.
        """
        each = [others.get("attention_mask") for _, others in self._others]
        if all(_hides_nothing(mask) for mask in each):
            return None
        named = [mask if isinstance(mask, dict) else {"": mask} for mask in each]
        length = self.embeds.shape[1]
        found = {name: torch.zeros(length, length, dtype=torch.bool) for name in named[0]}
        first = 0
        for (shape, _), masks in zip(self._others, named, strict=True):
            stop = first + shape[1]
            for name, whole in found.items():
                mask = masks.get(name)
                if not isinstance(mask, Tensor) or mask.shape != (1, 1, shape[1], stop):
                    raise _cannot_be_cut("attention_mask")
                seen, bias = seen_by(mask, 0, shape[1], shape[1], stop, None)
                if bias is not None and torch.where(seen, bias, 0).any():
                    raise _cannot_be_cut("attention_mask")
                whole[first:stop, :stop] = seen[0, 0]
            first = stop
        return {name: whole.to(self.embeds.device) for name, whole in found.items()}

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

    def layer_inputs(self, position: int | Tensor) -> Tensor:
        """Return the residual vector at a position before each layer and after the last one.

        Args:
            position: a position, or several, int64 [P].

        Returns:
            [L + 1, d], or [P, L + 1, d] for several positions. Those of one position are kept until another is asked
            for, as a lens reads layer after layer.
        """
        kept = self._inputs
        if kept is not None and isinstance(position, int) and kept[0] == position:
            return kept[1]
        last = int(position.max()) if isinstance(position, Tensor) else position
        found: list[Tensor] = []
        take = lambda _, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0, position])  # noqa: E731
        modules = [*self.text.layers, self.text.norm]
        with model_lock(self.text), self.text.inference():  # the hooks would also catch another thread's pass
            handles = [module.register_forward_pre_hook(take, with_kwargs=True) for module in modules]
            try:
                self.hidden_states(last + 1)
            finally:
                for handle in handles:
                    handle.remove()
        stacked = torch.stack([one.to(found[-1].device) for one in found], -2)
        if isinstance(position, int):
            self._inputs = position, stacked
        return stacked

    def added(self, layer: int, position: int) -> tuple[Tensor, Tensor]:
        """Return what a layer's attention, and the rest of the layer, add to the residual stream at one position.

        Returns:
            Two vectors [d]. The second is what the MLP adds, with all else that the layer does besides attention.

        Raises:
            InputError: the layer has no attention.
        """
        text = self.text
        site = text.site(layer)
        behind = text.post_norms[site] or text.outputs[site]
        if behind is None:
            raise InputError(f"layer {layer} has no output projection, so what its attention adds is not known")
        found: dict[str, Tensor] = {}

        def note(name: str, value: Any) -> None:
            first = value[0] if isinstance(value, tuple) else value
            found[name] = first[0, position]

        handles = [
            text.layers[layer].register_forward_pre_hook(
                lambda _, args, kwargs: note("before", args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            ),
            text.layers[layer].register_forward_hook(lambda _, args, output: note("after", output)),
            behind.register_forward_hook(lambda _, args, output: note("written", output)),
        ]
        try:
            with model_lock(text), text.inference():
                self.hidden_states(position + 1)
        finally:
            for handle in handles:
                handle.remove()
        home = found["after"].device  # an offloaded layer gives its output back where it came from
        found = {name: one.to(home) for name, one in found.items()}
        written = text.sites[site].multiplier * found["written"]
        return written, found["after"] - found["before"] - written

    @contextmanager
    def differentiable(self, stop: int) -> Iterator[Tensor]:
        """Yield the input embeddings as a leaf tensor [stop, d] that requires gradients.

        Inside the block gradients are enabled for this tensor and disabled for the weights.

        Raises:
            InputError: A layer of the model has no gradient.
        """
        with model_lock(self.text), torch.inference_mode(False), torch.enable_grad():
            # list the weights once: an offloaded weight is a new tensor each time it is loaded
            parameters = (*self.text.decoder.parameters(), *self.text.head.parameters())
            weights = [weight for weight in parameters if weight.requires_grad and not weight.is_inference()]
            try:
                for weight in weights:
                    weight.requires_grad_(False)
                yield self.embeds[0, :stop].clone().requires_grad_()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a quantised layer without a backward pass can raise anything
                raise _no_gradient(first_line(error)) from error
            finally:
                for weight in weights:
                    weight.requires_grad_(True)


def gradient(value: Tensor, embeds: Tensor) -> Tensor:
    """Return the gradient of a number with the embeddings that `Replay.differentiable` yields.

    Raises:
        InputError: No gradient flows through the model's layers.
    """
    if not value.requires_grad:
        raise _no_gradient("quantised layers that round their inputs have none")
    return torch.autograd.grad(value, embeds)[0]


def _usable(recorded: Tensor) -> Tensor:
    """Return a recorded tensor in a form through which gradients may flow where they are enabled."""
    fixed = recorded.is_inference() and not torch.is_inference_mode_enabled()
    return recorded.clone() if fixed else recorded


def _hides_nothing(mask: Any) -> bool:
    """Return whether a decoder makes the same mask by itself, as for one sequence without padding."""
    if isinstance(mask, dict):
        return all(_hides_nothing(one) for one in mask.values())
    if isinstance(mask, RowMask):
        return mask.causal
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))


def _is_mask(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == shape


def _no_gradient(why: str) -> InputError:
    return InputError(
        f"no gradient flows through this model's layers ({why}): take a heatmap method without gradients"
        ' ("logprob", "attention", "rollout", "tam")'
    )


def _cannot_be_cut(name: str) -> InputError:
    return InputError(
        f"the model's decoder was given {name!r}, which cannot be given again for a part of the sequence: maps and"
        " checks that run the model again cannot be made for this model or these options; those read from the cache can"
        ' (heatmap methods "logprob" and "attention")'
    )
