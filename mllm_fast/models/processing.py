"""The processor's side of a VLM: inputs from images and text, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, first_line
from ..core.images import ImageSource, load_image
from ..core.layout import TokenLayout
from ..core.video import LoadedVideo, Video, is_video
from .adapter import Adapter
from .image_tokens import image_tokens
from .media import VIDEO, Part, Turn, as_parts, clips, parts_of, stills, with_frames, words_of
from .offload import device_of
from .plain_text import PlainText
from .processor_settings import fill_settings
from .ready_inputs import ReadyInputs
from .video_inputs import VideoReader, check_order, video_arguments, with_timestamps

Images = ImageSource | Video | Sequence[ImageSource | Video]
_REMEMBERED_TURNS = 1024  # turns whose token ids are remembered
_REMEMBERED_LETTERS = 4096  # longer ones are not
_LEADS = 64  # how many beginnings of conversations are remembered with their token ids
_REPLY = "mllmfastreply"  # a placeholder answer that shows where the chat template puts an answer
_SAMPLE: list[Turn] = [("user", [None, _REPLY]), ("assistant", [_REPLY]), ("user", [_REPLY])]


class Prompts:
    """Makes the inputs of one model.

    Args:
        model, processor: The model and its processor, as in `ModelRunner`.
        adapter: The adapter of the model.
        config: The config of the model's text part.
        max_pixels: The size of the largest image that is accepted, in pixels.
    """

    def __init__(self, model: Any, processor: Any, adapter: Adapter, config: Any, max_pixels: int):
        self.model = model
        self.processor = processor
        self.adapter = adapter
        self.max_pixels = max_pixels
        fill_settings(processor, model.config)
        self.image_tokens = image_tokens(model, processor)
        self.window: int | None = getattr(config, "max_position_embeddings", None)
        self.ready = ReadyInputs()
        self._leads: dict[str, list[int]] = {}
        self._further: dict[Any, list[int]] = {}  # services ask the same questions about many pictures
        self._further_template: Any = None
        self.typed = PlainText(processor, lambda: self.spelled(_SAMPLE))
        self.videos = VideoReader(processor, adapter)

    def load(self, image: Images | None) -> list[Any]:
        """Load the images and videos of one prompt; None means a prompt of text alone and gives an empty list."""
        if image is None:
            return []
        many = image if isinstance(image, (list, tuple)) else [image]
        if not many:
            raise InputError("no image was given; give one, a list of them, or None for text alone")
        return [self._loaded(one) for one in many]

    def _loaded(self, one: Any) -> Any:
        if self.ready.has(one):
            return one
        return self.videos.load(one, self.max_pixels) if is_video(one) else load_image(one, self.max_pixels)

    def pictures(self, image: Any, prompt: str | list[str]) -> list[list[Any]]:
        """Load the images of each prompt."""
        if isinstance(prompt, str):
            return [self.load(image)]
        if not prompt:
            raise InputError("no prompt was given; give one, or a list of them")
        if not isinstance(image, (list, tuple)) or len(image) != len(prompt):
            got = len(image) if isinstance(image, (list, tuple)) else "one image"
            raise InputError(f"{len(prompt)} prompts need a list of as many images (or lists of images), got {got}")
        return [self.load(one) for one in image]

    def prepare(
        self, pictures: list[list[Any]], prompts: list[str], chat_template: bool = True
    ) -> tuple[Any, list[TokenLayout], list[int]]:
        """Return the processor's inputs for a batch, the layout of each sequence and its left padding."""
        ready = self.ready.find(pictures, prompts) if chat_template else None
        if ready is not None:
            return ready
        inputs = self.inputs(pictures, prompts, chat_template)
        mask = inputs["attention_mask"].bool()
        padding = (~mask).sum(1).tolist()
        layouts, first = [], (0, 0)
        for ids, pad, media in zip(inputs["input_ids"], padding, pictures, strict=True):
            layouts.append(prompt_layout(self, ids[pad:], inputs, media, first))
            first = first[0] + len(stills(media)), first[1] + len(clips(media))
        return inputs, layouts, padding

    def text(self, media: int | Sequence[Part], prompt: str) -> str:
        """Return a first turn as the chat template formats it; `media` are as in `further_ids`."""
        return self.spelled([("user", [*as_parts(media), prompt])])

    def inputs(self, pictures: list[list[Any]], prompts: list[str], chat_template: bool = True) -> Any:
        """Return the processor's inputs for a batch, on the model's device.

        Args:
            pictures: The images of each prompt.
            prompts: The prompts. Special tokens in them ("</s>", "<image>") are read as plain text.
            chat_template: Whether a prompt is the user's turn of the chat template; otherwise the images and the prompt
                are all that the model reads, and special tokens in the prompt are special.
        """
        for prompt in prompts:
            if not prompt.strip():
                raise InputError("the prompt is empty; ask a question about the image")
            _check_text(self.processor, prompt, "prompt", placeholders=not chat_template)
        for what, some in (("images", map(stills, pictures)), ("videos", map(clips, pictures))):
            found = [bool(one) for one in some]
            if any(found) and not all(found):
                raise InputError(f"a batch has {what} for all of its prompts or for none")
        pairs = [(parts_of(media), prompt) for media, prompt in zip(pictures, prompts, strict=True)]
        if chat_template:
            return self._inputs(pictures, [[("user", [*media, prompt])] for media, prompt in pairs])
        return self._inputs(
            pictures, [image_text(self.spelled, self.processor, media) + prompt for media, prompt in pairs]
        )

    def conversation(self, pictures: list[Any], turns: Sequence[Turn]) -> tuple[Any, TokenLayout]:
        """Return the processor's inputs for one conversation and its layout.

        Args:
            pictures: The images and videos, in the order in which the turns refer to them.
            turns: The turns of the conversation.
        """
        turns = with_frames(turns, pictures)
        for _, parts in turns:
            for part in words_of(parts):
                _check_text(self.processor, part, "message")
        inputs = self._inputs([pictures], [list(turns)])
        return inputs, prompt_layout(self, inputs["input_ids"][0], inputs, pictures)

    def _inputs(self, pictures: list[list[Any]], conversations: Sequence[str | Sequence[Turn]]) -> Any:
        """Return the processor's inputs for conversations, or for texts without the chat template."""
        spoken = not all(isinstance(one, str) for one in conversations)
        if spoken and not getattr(self.processor, "chat_template", None):
            raise InputError("the processor has no chat template; set processor.chat_template")
        images = [stills(media) for media in pictures]
        videos = video_arguments([one for media in pictures for one in clips(media)], self.processor)
        if any(images) and videos and not self.adapter.mixes:
            raise InputError(
                "this model's processor takes no images beside videos; let it read the frames as images:"
                " Video(..., as_images=True) (--frames-as-images)"
            )
        several = len(conversations) > 1
        batch = {"padding": True, "padding_side": "left"} if several else {}
        marks: list[list[str]] = [[] for _ in conversations]
        conversations = [
            one if isinstance(one, str) else self.typed.hide_turns(one, found)
            for one, found in zip(conversations, marks, strict=True)
        ]
        try:
            texts = [one if isinstance(one, str) else self.spelled(one) for one in conversations]
            check_order(texts, pictures, self.processor)
            inputs = self.processor(
                images=(images if several else images[0]) if any(images) else None,
                text=texts if several else texts[0],
                return_tensors="pt",
                **videos,
                **batch,
            )
        except InputError:
            raise
        except Exception as error:  # a damaged template or an unusual image can make it raise anything
            what = "video" if any(map(clips, pictures)) else "image"
            raise InputError(f"the processor cannot take this {what} and prompt: {first_line(error)}") from error
        for name in ("labels", "video_metadata"):  # for training, and for transformers itself
            inputs.pop(name, None)
        self.typed.restore(inputs, marks)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                dtype = self.model.dtype if value.is_floating_point() else None
                inputs[name] = value.to(device=device_of(self.model), dtype=dtype)
        self.check_window(inputs["input_ids"].shape[1] + 1, "the prompt and one more token take")
        return inputs

    def spelled(self, turns: Sequence[Turn]) -> str:
        """Return a conversation as the chat template formats it, up to where the model's next reply begins."""
        messages = [
            {
                "role": role,
                "content": [_content(part) for part in parts],
            }
            for role, parts in turns
        ]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def turn_ids(self, prompt: str, media: int | Sequence[Part], question: str) -> list[int]:
        """Return the token ids of a further turn with one question; see `further_ids`."""
        return self.further_ids(prompt, media, [("user", [question])])

    def further_ids(self, prompt: str, media: int | Sequence[Part], turns: Sequence[Turn]) -> list[int]:
        """Return the token ids of further turns in a conversation that began with images and `prompt`.

        These are the tokens that the chat template puts between the model's first reply and its next one. The end of
        the reply's turn is included.

        Args:
            prompt: The text of the first turn.
            media: How many images the first turn has; or what stands for its images and videos, see `parts_of`.
            turns: The further turns, of text alone.
        """
        template = getattr(self.processor, "chat_template", None)
        if self._further_template is not template:
            self._further, self._further_template = {}, template
        parts = as_parts(media)
        key = prompt, tuple(parts), tuple((role, tuple(said)) for role, said in turns)
        known = self._further.get(key)
        if known is None:
            known = self._further_ids(prompt, parts, turns)
            if len(prompt) + sum(len(part) for _, said in turns for part in words_of(said)) <= _REMEMBERED_LETTERS:
                if len(self._further) >= _REMEMBERED_TURNS:
                    self._further = {}
                self._further[key] = known
        return list(known)

    def _further_ids(self, prompt: str, media: Sequence[Part], turns: Sequence[Turn]) -> list[int]:
        for _, parts in turns:
            question = "".join(words_of(parts))
            if not question.strip():
                raise InputError("the question is empty; ask something about the image")
            _check_text(self.processor, question, "question")
        first: Turn = ("user", [*media, prompt])
        marks: list[str] = []
        spoken = self.typed.hide_turns([first], [])
        turns = self.typed.hide_turns(turns, marks)
        try:
            text = self.spelled([*spoken, ("assistant", [_REPLY]), *turns])
        except Exception as error:  # a template can raise anything
            raise InputError(f"the chat template takes no further turn: {first_line(error)}") from error
        before, reply, turn = text.partition(_REPLY)
        if not reply or not turn.strip():
            raise InputError("the chat template drops earlier replies, so no question can follow one")
        tokenizer = self.processor.tokenizer
        ids, lead = tokenizer(before + turn).input_ids, _lead_ids(tokenizer, before, self._leads)
        # otherwise the tokenizer splits the text differently at this place
        ids = ids[len(lead) :] if ids[: len(lead)] == lead else tokenizer(turn, add_special_tokens=False).input_ids
        return self.typed.restored(ids, marks)

    def answer_ids(self, answer: str | Sequence[int]) -> Tensor:
        """Return the token ids of a given answer (its text, or ids), int64 [n], on the model's device."""
        if isinstance(answer, str):
            _check_text(self.processor, answer, "answer to be explained")
            marks: list[str] = []
            text = self.typed.hide(answer, marks)
            ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids if answer.strip() else []
            ids = self.typed.restored(ids, marks)
        else:
            ids = [int(one) for one in answer]
        if not ids:
            raise InputError("the answer to be explained is empty; give at least one word, or None to generate one")
        if not self.image_tokens.both.isdisjoint(ids[:-1]):  # the model does not read the last one
            raise InputError("the answer to be explained holds the image token, which stands for a part of an image")
        return torch.tensor(ids, device=device_of(self.model))

    def check_window(self, length: int, what: str) -> None:
        """Raise InputError if a sequence of this length does not fit the model's context window."""
        if self.window and length > self.window:
            raise InputError(
                f"{what} {length} tokens, the model's window is {self.window}; shorten the text or make the image"
                " smaller"
            )


def _content(part: Part) -> dict[str, str]:
    """Return a part of a turn as chat templates read it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video" if part is VIDEO else "image"}


def image_text(spelled: Callable[[Sequence[Turn]], str], processor: Any, media: int | Sequence[Part]) -> str:
    """Return the text that stands for images in front of a prompt: what the chat template adds for them.

    Args:
        spelled: A function that returns a conversation as the chat template formats it.
        processor: The processor. Without a chat template its image token stands for an image.
        media: How many images there are; or what stands for images and videos, see `parts_of`.
    """
    media = as_parts(media)
    if not media:
        return ""
    if not getattr(processor, "chat_template", None):
        return "".join(processor.video_token if one is VIDEO else processor.image_token for one in media)
    try:
        shown, plain = (spelled([("user", [*images, _REPLY])]) for images in (media, []))
    except Exception as error:  # a template can raise anything
        raise InputError(f"the chat template takes no image: {first_line(error)}") from error
    with_images, without = shown.partition(_REPLY)[0], plain.partition(_REPLY)[0]
    for at in range(len(without), -1, -1):  # the images stand behind so many letters of what precedes the prompt
        before, after = without[:at], without[at:]
        if with_images.startswith(before) and with_images.endswith(after):
            return with_images[at : len(with_images) - len(after)]
    raise InputError("the chat template shows no text that stands for an image: ask with the chat template")


_TEXT = "The quick brown fox jumps over the lazy dog while nine old men count the stars above a quiet harbour."

_VARIED = 8  # different tokens that the text has at least


def ordinary_ids(processor: Any) -> list[int]:
    """Return the token ids of some ordinary text, on which a model can be run."""
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    ids = [one for one in tokenizer(_TEXT, add_special_tokens=False).input_ids if one not in special]
    if len(set(ids)) >= _VARIED:
        return ids
    return [one for one in range(len(tokenizer)) if one not in special]  # a tokenizer of few words


def prompt_layout(
    prompts: Prompts, ids: Tensor, inputs: Any, media: Sequence[Any], first: tuple[int, int] = (0, 0)
) -> TokenLayout:
    """Return the layout of one prompt of a batch.

    Args:
        prompts: What made the inputs.
        ids: Token ids of the prompt, without padding.
        inputs: The processor's output for the batch.
        media: The images and videos of the prompt; of an image its size (width, height) is enough.
        first: How many images and videos the processor read for the earlier prompts of the batch.

    Raises:
        InputError: It is not known which image tokens are whose.
    """
    tokens, ids = prompts.image_tokens, ids.cpu()
    placed = _placed(prompts, inputs, media, first)
    if prompts.adapter.knows_tiles:
        layout = TokenLayout.from_input_ids(ids, tokens.both, placed, len(ids), tokens.separators)
    else:
        sizes = [size for size, *_ in placed]
        try:
            layout = TokenLayout.from_prompt_ids(ids, tokens.both, None, tokens.separators, sizes)
        except ValueError as error:
            raise InputError(f"{error}; give one image a prompt") from None
        layout = layout.at_moments([rest[-1] if rest else None for _, *rest in placed])
    return with_timestamps(layout, ids, tokens.separators, prompts.processor.tokenizer)


def _placed(prompts: Prompts, inputs: Any, media: Sequence[Any], first: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Return the size of each image and moment, followed by its tiles (if they are known) and its `Moment`."""
    adapter, processor, (image, clip) = prompts.adapter, prompts.processor, first
    placed: list[tuple[Any, ...]] = []
    video = 0
    for one in media:
        is_video = isinstance(one, LoadedVideo)
        if is_video and not one.as_images:
            for frames, tiling in adapter.moments(processor, inputs, clip, len(one.frames), one.size):
                placed.append((one.size, *tiling, one.moment(video, frames)))
            clip += 1
        else:
            size = one if isinstance(one, tuple) else one.size
            for i in range(len(one.frames) if is_video else 1):
                tiles = adapter.tiles(processor, inputs, image, size) if adapter.knows_tiles else ()
                placed.append((size, *tiles, *((one.moment(video, (i,)),) if is_video else ())))
                image += 1
        video += is_video
    return placed


def _lead_ids(tokenizer: Any, text: str, known: dict[str, list[int]]) -> list[int]:
    """Return the token ids of the beginning of a conversation; `known` has the latest, since many turns follow one."""
    ids = known.get(text)
    if ids is None:
        ids = tokenizer(text).input_ids
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        if len(known) >= _LEADS:
            known.clear()
        known[text] = ids
    return ids


def _check_text(processor: Any, text: str, what: str, placeholders: bool = False) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {what} is not valid Unicode; give it as UTF-8") from None
    for name in ("image_token", "video_token") if placeholders else ():
        placeholder = getattr(processor, name, None)
        if placeholder and placeholder in text:
            raise InputError(
                f"the {what} holds the placeholder {placeholder!r}; leave it out, images are added for you"
            )
