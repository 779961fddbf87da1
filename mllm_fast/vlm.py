"""VLM: a vision-language model and its processor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import find_adapter, text_model
from .attention import Recording, model_lock, recording
from .errors import InputError, first_line
from .explain import Explanation
from .images import MAX_PIXELS, ImageSource, load_image
from .kernels import OperatorCache
from .layout import TokenLayout
from .loading import load_pretrained, parse_device, parse_dtype
from .trace import make_trace

_OPERATOR_BYTES = 1 << 30  # budget of the cached operators, unless the caller gives another


@dataclass(frozen=True)
class Answer:
    """What a model said. `token_ids` are the answer's, without the end-of-sequence token; `tokens` their
    texts; `input_ids` (int64 [N]) the whole sequence, answer included; `layout` its segments."""

    text: str
    token_ids: list[int]
    tokens: list[str]
    layout: TokenLayout
    input_ids: Tensor


class VLM:
    """A model loaded with transformers and its processor, ready to generate and to explain.

    Args:
        model: one of the supported classes (see `mllm_fast.adapters.ADAPTERS`).
        processor: the model's processor, with a chat template.
        max_pixels: largest picture that is read, in pixels.
        operator_bytes: budget of the operator cache that makes repeated explanations fast.

    Raises:
        InputError: the architecture is not supported.
    """

    def __init__(
        self, model: Any, processor: Any, *, max_pixels: int = MAX_PIXELS, operator_bytes: int = _OPERATOR_BYTES
    ):
        self.adapter = find_adapter(model)
        self.model = model
        self.processor = processor
        self.max_pixels = max_pixels
        self.text = text_model(model, self.adapter)
        self.operators = OperatorCache(operator_bytes)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_pixels: int = MAX_PIXELS,
        **options: Any,
    ) -> VLM:
        """Load "shapes" (the embedded model), a folder, or a hub id.

        `device`: the GPU if there is one, else the CPU. `dtype`: float32 on the CPU, else bfloat16. Other
        options go to transformers' `from_pretrained`.
        """
        where = parse_device(device)
        model, processor = load_pretrained(str(name), where, parse_dtype(dtype, where), **options)
        return cls(model, processor, max_pixels=max_pixels)

    def generate(
        self,
        image: ImageSource | Sequence[ImageSource],
        prompt: str,
        *,
        max_new_tokens: int = 32,
        **options: Any,
    ) -> Answer:
        """Answer a prompt about one picture, or about several. Greedy unless `do_sample=True`; options are
        those of transformers' `generate`."""
        inputs, sizes = self.prepare(image, prompt)
        output = self._generate(inputs, max_new_tokens, options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        return self._answer(sequences[0], inputs, sizes, options)

    def explain(
        self,
        image: ImageSource | Sequence[ImageSource],
        prompt: str,
        answer: str | None = None,
        *,
        norm: str = "frozen",
        max_new_tokens: int = 32,
        **options: Any,
    ) -> Explanation:
        """Generate an answer, or force `answer`, and explain every token of it from that one pass.

        Args:
            image: a picture, or several for one prompt.
            prompt: the question, without the image placeholder.
            answer: the text to be explained in place of the model's own answer.
            norm: "frozen" or "own", see `mllm_fast.kernels.logprob_increase`.
            max_new_tokens, options: as in `generate`, for one sequence and one beam.
        """
        if norm not in ("frozen", "own"):
            raise InputError(f"norm is 'frozen' or 'own', got {norm!r}")
        pictures = self._load(image)
        inputs, sizes = self.prepare(pictures, prompt)
        prompt_length = inputs["input_ids"].shape[1]
        if answer is None:
            for name in ("num_beams", "num_return_sequences"):
                if options.get(name, 1) != 1:
                    raise InputError(
                        f"explain follows one sequence, got {name}={options[name]}: call generate first and pass its"
                        " text as answer="
                    )
            settings = {**options, "num_beams": 1, "use_cache": True, "return_dict_in_generate": True}
            with recording(self.text, rows=1) as record:
                output = self._generate(inputs, max_new_tokens, settings)
            sequence, cache = output.sequences[0], output.past_key_values
        else:
            if options:
                raise InputError(f"{', '.join(options)} cannot be used with a given answer: nothing is generated")
            sequence = torch.cat([inputs["input_ids"][0], self._answer_ids(answer)])
            self._check_window(len(sequence), "the prompt and the answer take")
            record, cache = self._forced(inputs, sequence)
        said = self._answer(sequence, inputs, sizes, options)
        if not said.token_ids:
            raise InputError("the answer is empty: there is no token to explain; ask another question")
        return Explanation(
            vlm_text=self.text,
            operators=self.operators,
            trace=make_trace(record, cache, len(said.token_ids), prompt_length),
            answer=said,
            prompt=prompt,
            images=pictures,
            norm=norm,
        )

    def prepare(self, image: ImageSource | Sequence[ImageSource], prompt: str) -> tuple[Any, list[tuple[int, int]]]:
        """The processor's inputs for one sequence, on the model's device, and the pictures' sizes
        (width, height)."""
        pictures = self._load(image)
        if not prompt.strip():
            raise InputError("the prompt is empty; ask a question about the picture")
        self._check_text(prompt, "prompt")
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": prompt}]
        if not getattr(self.processor, "chat_template", None):
            raise InputError("the processor has no chat template; set processor.chat_template")
        chat = [{"role": "user", "content": content}]
        try:
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = self.processor(images=pictures, text=text, return_tensors="pt")
        except Exception as error:  # whatever a damaged template, or a picture it cannot take, makes it raise
            raise InputError(f"the processor cannot take this picture and prompt: {first_line(error)}") from error
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                dtype = self.model.dtype if value.is_floating_point() else None
                inputs[name] = value.to(device=self.model.device, dtype=dtype)
        self._check_window(inputs["input_ids"].shape[1] + 1, "the prompt and one more token take")
        return inputs, [picture.size for picture in pictures]

    def _check_window(self, length: int, what: str) -> None:
        window = getattr(self.text.config, "max_position_embeddings", None)
        if window and length > window:
            raise InputError(
                f"{what} {length} tokens, the model's window is {window}; shorten the text or make the picture smaller"
            )

    def _check_text(self, text: str, what: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the {what} is not valid Unicode; give it as UTF-8") from None
        for name in ("image_token", "video_token"):
            placeholder = getattr(self.processor, name, None)
            if placeholder and placeholder in text:
                raise InputError(
                    f"the {what} holds the placeholder {placeholder!r}; leave it out, pictures are added for you"
                )

    def _load(self, image: ImageSource | Sequence[ImageSource]) -> list[Any]:
        many = image if isinstance(image, (list, tuple)) else [image]
        if not many:
            raise InputError("no picture was given; give one, or a list of them")
        return [load_image(one, self.max_pixels) for one in many]  # type: ignore[arg-type]

    def _generate(self, inputs: Any, max_new_tokens: int, options: dict[str, Any]) -> Any:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is at least 1, got {max_new_tokens}")
        settings = {"do_sample": False, **options}
        if not settings["do_sample"]:
            # a checkpoint's own sampling settings would only make transformers warn
            settings = {"temperature": None, "top_p": None, "top_k": None} | settings
        with model_lock(self.text), torch.inference_mode():
            return self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)

    def _forced(self, inputs: Any, sequence: Tensor) -> tuple[Recording, Any]:
        """One pass over prompt and answer; the last token's own row is not needed."""
        count = len(sequence) - inputs["input_ids"].shape[1]
        extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in extra:
            kinds = extra["mm_token_type_ids"]
            extra["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, count - 1))
        ids = sequence[None, :-1]
        with recording(self.text, rows=count) as record, torch.inference_mode():
            output = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1, **extra
            )
        return record, output.past_key_values

    def _answer_ids(self, answer: str) -> Tensor:
        self._check_text(answer, "answer to be explained")
        ids = self.processor.tokenizer(answer, add_special_tokens=False).input_ids if answer.strip() else []
        if not ids:
            raise InputError("the answer to be explained is empty; give at least one word, or None to generate one")
        return torch.tensor(ids, device=self.model.device)

    def _answer(
        self, sequence: Tensor, inputs: Any, sizes: list[tuple[int, int]], options: dict[str, Any] | None = None
    ) -> Answer:
        prompt_length = inputs["input_ids"].shape[1]
        ids = sequence[prompt_length:].tolist()
        stop = self._stop_ids(options or {})
        while ids and ids[-1] in stop:
            ids.pop()
        kept = sequence[: prompt_length + len(ids)].cpu()
        tilings = [(size, *self.adapter.tiles(self.processor, inputs, i, size)) for i, size in enumerate(sizes)]
        layout = TokenLayout.from_input_ids(kept[:prompt_length], self.processor.image_token_id, tilings, prompt_length)
        layout = TokenLayout(len(kept), prompt_length, layout.images)
        tokens = token_texts(self.processor.tokenizer, ids)
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(text, ids, tokens, layout, kept)

    def _stop_ids(self, options: dict[str, Any]) -> set[int]:
        """Ids that end an answer and are no part of it."""
        config = options.get("generation_config", self.model.generation_config)
        stop = options.get("eos_token_id", getattr(config, "eos_token_id", None))
        stop = self.processor.tokenizer.eos_token_id if stop is None else stop
        padding = self.processor.tokenizer.pad_token_id
        return {*(stop if isinstance(stop, (list, tuple)) else [stop]), padding} - {None}  # type: ignore[return-value]


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token's own text, spaces included: what decoding it adds. Bytes of an unfinished character
    belong to the token that finishes it."""
    texts, before = [], ""
    for i in range(len(ids)):
        now = tokenizer.decode(ids[: i + 1])
        if now.endswith("\ufffd") and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :] if now.startswith(before) else tokenizer.decode([ids[i]]))
        before = now
    return texts
