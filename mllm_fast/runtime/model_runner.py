"""ModelRunner: a model with its processor and parts, and the ways to run it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.images import MAX_PIXELS
from ..core.layout import TokenLayout
from ..core.notebook import Displayed, NotPickled, table
from ..kernels import OperatorCache, tuning
from ..kernels.dispatch import choose
from ..knockout.attention_share import AttentionShares
from ..knockout.plan import Plan, plan_of
from ..knockout.rule import Knockout
from ..models.adapter import Adapter
from ..models.architectures import find_adapter
from ..models.media import stills
from ..models.offload import device_of
from ..models.part_checks import check_parts
from ..models.processing import Images, Prompts, ordinary_ids
from ..models.provenance import model_name
from ..models.text_model import text_model
from .direct_passes import passes
from .generation_settings import GenerationSettings
from .hooks import meet, model_lock
from .kv_cache import CACHE, cache_of, full_cache
from .record import Recording
from .token_bytes import TokenBytes

_OPERATOR_BYTES = 1 << 30  # default budget of the operator cache

Knockouts = Knockout | str | Sequence[Knockout | str] | None

Runner = TypeVar("Runner", bound="ModelRunner")


class ModelRunner(Displayed, NotPickled):
    """A model loaded with transformers and its processor, ready to be run and recorded.

    Args:
        model: An image-text-to-text model of any type. Its parts are found by running it once on a short text.
        processor: The model's processor, with a chat template.
        max_pixels: The size of the largest image that is accepted, in pixels.
        operator_bytes: The budget of the operator cache, which makes repeated explanations fast.
        backend: The kernels' backend, "auto", "triton", "cpu" or "torch"; see `mllm-fast info`.
        adapter: Says how the processor lays out image tokens, for an architecture that is not registered. Without it
            heatmaps of such a model are refused.

    Raises:
        InputError: A part of the model cannot be found, or the backend is unknown or does not work on its device.
    """

    _INSTEAD = "load it in the other process, by VLM.from_pretrained"

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
        try:  # refuse an unusable backend here rather than at the first call that needs it
            choose(device_of(model), model.dtype, backend, op="knockout_attention")
        except ValueError as error:
            raise InputError(str(error)) from None
        if device_of(model).type == "cpu" and backend in ("auto", "cpu"):
            tuning.ready()
        self.model = model
        self.processor = processor
        self.backend = backend
        self.text = text_model(model, ordinary_ids(processor))
        check_parts(self.text)
        self.prompts = Prompts(model, processor, self.adapter, self.text.config, max_pixels)
        self.operators = OperatorCache(operator_bytes)
        self._token_bytes: tuple[Any, int, TokenBytes] | None = None

    def __repr__(self) -> str:
        facts = dict(self._facts())
        name = facts["model"]
        return (
            f"{type(self).__name__}({name!r}, {facts['type']}, {facts['layers']} layers of {facts['heads']} heads,"
            f" {facts['dtype']}, {facts['device']})"
        )

    def _repr_html_(self) -> str:
        return table(self._facts())

    def _facts(self) -> list[tuple[str, Any]]:
        return [
            ("model", model_name(self.model) or "given"),
            ("type", type(self.model).__name__),
            ("layers", len(self.text.layers)),
            ("heads", self.text.num_heads),
            ("dtype", str(self.model.dtype).removeprefix("torch.")),
            ("device", str(device_of(self.model))),
        ]

    @property
    def token_bytes(self) -> TokenBytes:
        """The text and bytes of single tokens, read from the tokenizer once until tokens are added to it."""
        tokenizer = self.processor.tokenizer
        known = self._token_bytes
        if known is None or known[0] is not tokenizer or known[1] != len(tokenizer):
            self._token_bytes = known = tokenizer, len(tokenizer), TokenBytes(tokenizer)
        return known[2]

    def with_processor(self: Runner, processor: Any) -> Runner:
        """Return this model with another processor. Both objects share the model, and this one is unchanged."""
        other = copy.copy(self)
        other.processor = processor
        other.prompts = Prompts(self.model, processor, self.adapter, self.text.config, self.prompts.max_pixels)
        return other

    def prepare(self, image: Images | None, prompt: str) -> tuple[Any, list[tuple[int, int]]]:
        """Prepare one sequence for the model.

        Returns:
            The processor's inputs, on the model's device, and the size (width, height) of each image, frames of videos
            that are read as images among them.
        """
        pictures = self.prompts.load(image)
        return self.prompts.inputs([pictures], [prompt]), [picture.size for picture in stills(pictures)]

    def plan(
        self, knockout: Knockouts, layouts: Sequence[TokenLayout], padding: Sequence[int] | None = None
    ) -> Plan | None:
        """Return the plan of some knockouts for sequences of these layouts, or None if there is no knockout.

        In a hybrid model a warning says which layers a knockout does not reach, see `Findings.others`.
        """
        count, others = len(self.text.layers), self.text.findings.others
        plan = plan_of(knockout, layouts, count, padding, device_of(self.model), self.prompts.window)
        missed = () if plan is None else plan.unreached(others)
        if missed:
            warnings.warn(
                f"knockouts close attention; {len(missed)} of the {count} layers of this model are {others[missed[0]]},"
                " which still carry what they read from one position to the next: Knockout(..., zero_inputs=True) gives"
                " them zeros in place of the source",
                stacklevel=3,
            )
        return plan

    def whole_cache(self, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return a cache that keeps every position, as an argument of the model; empty if its own cache does.

        Args:
            options: The caller's arguments of `generate`.

        Raises:
            InputError: They name a cache, and the model's own would not keep every position.
        """
        if not any(site.window for site in self.text.sites):
            return {}
        named = (options or {}).get("cache_implementation")
        if named is not None:
            raise InputError(
                f"layers of this model see a sliding window, and a {named} cache forgets what is outside it, which is"
                " read here: leave cache_implementation at transformers' default"
            )
        return {CACHE: full_cache(self.text)}

    def settings(
        self, max_new_tokens: int | None = None, options: Mapping[str, Any] | None = None, greedy: bool = False
    ) -> GenerationSettings:
        """Return the settings of an answer; see `GenerationSettings`."""
        window = self.prompts.window
        return GenerationSettings(self.model, self.processor.tokenizer, max_new_tokens, options, greedy, window)

    @contextmanager
    def greedy(self) -> Iterator[None]:
        """Take the likeliest tokens inside the block, unless a call says otherwise, whatever the checkpoint says."""
        before = self.model.generation_config
        self.model.generation_config = copy.deepcopy(before)
        self.model.generation_config.do_sample = False
        try:
            yield
        finally:
            self.model.generation_config = before

    def run(
        self,
        inputs: Any,
        settings: GenerationSettings,
        plan: Plan | None = None,
        shares: AttentionShares | None = None,
        **forced: Any,
    ) -> Any:
        """Run transformers' `generate`.

        Args:
            inputs: The processor's inputs.
            settings: The settings of the answer.
            plan, shares: The arguments `knockouts` and `shares` of `recording`.
            forced: Arguments of `generate` that take precedence over the settings.
        """
        arguments = {**inputs, **settings.arguments(inputs["input_ids"].shape[1], **forced)}
        with model_lock(self.text), self.text.inference():
            meet(self.text)
            if plan is None and shares is None:
                return self.model.generate(**arguments)
            with passes(self.text, 0, plan, shares, self.backend, self.model):
                return self.model.generate(**arguments)

    def _type_of_answers(self, inputs: Any, name: str) -> int:
        """Return the token type of an answer's tokens, which see the tokens before them alone: not that of images.

        Gemma 3 gives images the type 1, PaliGemma the type 0.
        """
        image = inputs["input_ids"] == self.prompts.image_tokens.image
        return 1 - int(inputs[name][image][0]) if image.any() else 0

    def begun(
        self, inputs: Any, layouts: Sequence[TokenLayout], prefix: str | Sequence[int] | None
    ) -> tuple[Any, list[TokenLayout]]:
        """Return the inputs and layouts of sequences whose answers begin with given words.

        The model goes on from them. They count as part of the prompt (of its segment "query").
        """
        if prefix is None:
            return inputs, list(layouts)
        ids = self.prompts.answer_ids(prefix)
        rows, count = len(inputs["input_ids"]), len(ids)
        longer = dict(inputs)
        longer["input_ids"] = torch.cat([inputs["input_ids"], ids.expand(rows, -1)], 1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in longer:
                kind = self._type_of_answers(inputs, name)
                longer[name] = torch.nn.functional.pad(longer[name], (0, count), value=kind)
        longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, count), value=1)
        self.prompts.check_window(longer["input_ids"].shape[1] + 1, "the prompt, the prefix and one more token take")
        lengths = [(layout, layout.length + count) for layout in layouts]
        return longer, [replace(layout, length=length, prompt_length=length) for layout, length in lengths]

    def run_forced(self, inputs: Any, sequence: Tensor, plan: Plan | None) -> tuple[Recording, Any]:
        """Run one forward pass over prompt and answer, without the last token, whose row is not needed.

        Returns:
            The recording of the rows that predict the answer, and the KV cache.
        """
        count = len(sequence) - inputs["input_ids"].shape[1]
        extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in extra:
                extra[name] = torch.nn.functional.pad(
                    extra[name], (0, count - 1), value=self._type_of_answers(inputs, name)
                )
        ids = sequence[None, :-1]
        with passes(self.text, count, plan, backend=self.backend, read=count) as record, self.text.inference():
            output = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=True,
                logits_to_keep=count if self.text.shares_keys else 1,  # such a decoder leaves out the other rows
                **self.whole_cache(),
                **extra,
            )
        return record, cache_of(output)
