"""ModelRunner: a model, its processor and its parts, and the ways in which they are run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.images import MAX_PIXELS
from ..core.layout import TokenLayout
from ..kernels import OperatorCache
from ..kernels.dispatch import choose
from ..knockout.attention_share import AttentionShares
from ..knockout.plan import Plan, plan_of
from ..knockout.rule import Knockout
from ..models.adapter import Adapter
from ..models.architectures import find_adapter
from ..models.offload import check_one_device, device_of
from ..models.part_checks import check_parts
from ..models.processing import Images, Prompts
from ..models.text_model import text_model
from .hooks import Recording, model_lock, recording
from .kv_cache import cache_of

_OPERATOR_BYTES = 1 << 30  # budget of the cached operators, unless the caller gives another

Knockouts = Knockout | Sequence[Knockout] | None


class ModelRunner:
    """A model loaded with transformers and its processor, ready to be run and recorded.

    Args:
        model: an image-text-to-text model whose architecture is known (`mllm-fast info` lists them), or for which
            `adapter` is given.
        processor: the model's processor, with a chat template.
        max_pixels: the largest image that is read, in pixels.
        operator_bytes: the budget of the operator cache that makes repeated explanations fast.
        backend: the kernels' backend, "auto", "triton", "cpu" or "torch"; see `mllm-fast info`.
        adapter: where the model keeps its parts, for an architecture that is not registered.

    Raises:
        InputError: the architecture is not supported, or the backend unknown or of no use on the model's device.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_pixels: int = MAX_PIXELS,
        operator_bytes: int = _OPERATOR_BYTES,
        backend: str = "auto",
        adapter: Adapter | type[Adapter] | None = None,
    ):
        self.adapter = find_adapter(model) if adapter is None else adapter() if isinstance(adapter, type) else adapter
        check_one_device(model)
        try:  # a choice that cannot serve is refused here, not by the first call that needs it
            choose(device_of(model), model.dtype, backend, op="knockout_attention")
        except ValueError as error:
            raise InputError(str(error)) from None
        self.model = model
        self.processor = processor
        self.backend = backend
        self.text = text_model(model, self.adapter)
        check_parts(self.text)
        self.prompts = Prompts(model, processor, self.adapter, self.text.config, max_pixels)
        self.operators = OperatorCache(operator_bytes)

    def prepare(self, image: Images | None, prompt: str) -> tuple[Any, list[tuple[int, int]]]:
        """The processor's inputs for one sequence, on the model's device, and the images' sizes
        (width, height)."""
        pictures = self.prompts.load(image)
        return self.prompts.inputs([pictures], [prompt]), [picture.size for picture in pictures]

    def plan(
        self, knockout: Knockouts, layouts: Sequence[TokenLayout], padding: Sequence[int] | None = None
    ) -> Plan | None:
        """The plan of some knockouts for sequences of these layouts; None where there is no knockout."""
        return plan_of(knockout, layouts, len(self.text.layers), padding, device_of(self.model), self.prompts.window)

    def run(
        self,
        inputs: Any,
        max_new_tokens: int,
        options: dict[str, Any],
        plan: Plan | None = None,
        shares: AttentionShares | None = None,
    ) -> Any:
        """transformers' `generate`, greedy unless asked to sample; `plan` and `shares` as in `recording`."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is at least 1, got {max_new_tokens}")
        settings = {"do_sample": False, **options}
        if not settings["do_sample"]:
            # a checkpoint's own sampling settings would only make transformers warn
            settings = {"temperature": None, "top_p": None, "top_k": None} | settings
        with model_lock(self.text), torch.inference_mode():
            if plan is None and shares is None:
                return self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
            with recording(self.text, 0, plan, shares, self.backend):
                return self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)

    def run_forced(self, inputs: Any, sequence: Tensor, plan: Plan | None) -> tuple[Recording, Any]:
        """One pass over prompt and answer; the last token's own row is not needed."""
        count = len(sequence) - inputs["input_ids"].shape[1]
        extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in extra:
            kinds = extra["mm_token_type_ids"]
            extra["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, count - 1))
        ids = sequence[None, :-1]
        with recording(self.text, count, plan, backend=self.backend) as record, torch.inference_mode():
            output = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1, **extra
            )
        return record, cache_of(output)
