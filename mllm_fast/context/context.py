"""Context: what is kept of an image, to ask questions about it many times (image re-prompting, arXiv 2411.17491)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.deprecation import renamed, renamed_parameters
from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..core.notebook import Displayed, NotPickled, frame, picture, plot_image, table
from ..explain.explanation import Explanation, nothing_generated
from ..explain.scores import check_norm
from ..explain.stream import Stream
from ..knockout.rule import spans
from ..models.offload import device_of_part
from ..runtime.answer import Answer, answer_of
from ..runtime.decoding import Pass
from ..runtime.kv_cache import of_own_shape
from ..runtime.model_runner import ModelRunner
from ..runtime.recurrent import State, tensors_of
from . import file_format
from .figure import draw_kept
from .questions import Questions

_BATCH = 32
_COLUMNS = ("position", "image", "left", "top", "right", "bottom")


@dataclass(frozen=True)
class Kept(Displayed):
    """The image tokens that one layer of a context keeps.

    Attributes:
        positions: the tokens' positions in the uncompressed prefix, int64 [K], ascending.
        images: the index of each token's image, int64 [K].
        boxes: the pixel box of each token in its image (left, top, right, bottom), float64 [K, 4].
    """

    positions: Tensor
    images: Tensor
    boxes: np.ndarray

    def __repr__(self) -> str:
        return f"Kept({len(self.positions)} image tokens: positions {spans(self.positions.tolist())})"

    def _repr_html_(self) -> str:
        return table(self.rows(), _COLUMNS)

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the tokens as (position, image, left, top, right, bottom)."""
        each = zip(self.positions.tolist(), self.images.tolist(), self.boxes.tolist(), strict=True)
        return [(position, image, *box) for position, image, box in each]

    def to_frame(self) -> Any:
        """Return the tokens as a pandas DataFrame: "position", "image", "left", "top", "right", "bottom"."""
        return frame(self.rows(), _COLUMNS)


@dataclass(frozen=True, eq=False)
class Context(Displayed, NotPickled):  # long: what can be asked of it is a method each
    """Keys and values of an image's prefix: in each layer, those of the text tokens and of the kept image tokens.

    A context never changes. Questions keep their own keys and values beside it, and several threads may ask at once
    (the model serves one at a time). Tokens keep their original positions, and a question has the positions that it
    would have after the whole prefix.

    Attributes:
        vlm: the model that answers the questions.
        keys: [S, Hkv, M, D] for the S layers with attention; [S, 1, M, F] if their heads differ. They lie on the
            model's device, or on the CPU if its layers compute on several; each layer then has a copy where it
            computes, from the first question on.
        values: in the form of `keys`.
        positions: the positions of the kept tokens in the uncompressed prefix, int64 [S, M], ascending.
        layout: the layout of the uncompressed prefix (system, image and query tokens).
        input_ids: the token ids of the uncompressed prefix.
        position: the position of the next token, for the rotary embedding.
        prompt: the prompt of the first turn.
        description: the model's answer to the prompt, if the score needed one.
        settings: keep, score and parts, and how many image tokens are kept.
        images: the images, if they are available.
        peak_nbytes: the most bytes of keys and values held at once while the context was made; 0 if it was read from a
            file.
        state: what layers without attention keep of the whole prefix, image included; None if the model has none.
        first_token: the first token of the model's answer to the prompt, from which `describe` goes on; None in files
            of older releases.
    """

    vlm: ModelRunner
    keys: Tensor
    values: Tensor
    positions: Tensor
    layout: TokenLayout
    input_ids: Tensor
    position: int
    prompt: str
    description: str
    settings: dict[str, Any]
    images: tuple[Any, ...] = ()
    peak_nbytes: int = 0
    state: State | None = None
    first_token: int | None = None

    __getattr__ = renamed(pictures="canvases")

    def __repr__(self) -> str:
        return (
            f"Context({self.num_tokens} of {self.prefix_length} tokens, {self.nbytes / 2**20:.2f} of"
            f" {self.full_nbytes / 2**20:.2f} MiB, {self.settings})"
        )

    _INSTEAD = "save it to a .safetensors file, and load it in the other process with Context.load"

    def _repr_html_(self) -> str:
        facts = [
            ("prompt", self.prompt),
            ("tokens a layer", f"{self.num_tokens} of {self.prefix_length}"),
            ("memory", f"{self.nbytes / 2**20:.2f} of {self.full_nbytes / 2**20:.2f} MiB"),
            ("settings", ", ".join(f"{name}: {value}" for name, value in self.settings.items())),
        ]
        return table(facts) + picture(self.image(), "The image tokens that each layer keeps")

    def image(self) -> Image.Image:
        """Return a picture of the image tokens that each layer keeps."""
        return draw_kept(self)

    def plot(self, ax: Any = None) -> Any:
        """Draw the picture of `image` into matplotlib axes, and return them."""
        return plot_image(self.image(), ax)

    def to_frame(self) -> Any:
        """Return what each layer keeps as a pandas DataFrame: "layer", and the columns of `Kept.to_frame`."""
        layers = range(len(self.positions))
        return frame([(n, *row) for n in layers for row in self.kept(n).rows()], ("layer", *_COLUMNS))

    @property
    def num_tokens(self) -> int:
        """The number of tokens that each layer keeps, text included."""
        return self.keys.shape[2]

    @property
    def prefix_length(self) -> int:
        """The number of tokens in the uncompressed sequence (system, image and query)."""
        return self.layout.length

    @property
    def nbytes(self) -> int:
        """The bytes of keys, values, positions and state."""
        state = sum(tensor.nbytes for tensor in tensors_of(self.state or {}).values())
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes + state

    @property
    def full_nbytes(self) -> int:
        """The bytes of the uncompressed prefix's keys and values."""
        return (self.keys.nbytes + self.values.nbytes) // self.num_tokens * self.prefix_length

    @property
    def canvases(self) -> list[Any]:
        """The images to draw on: `images`, or grey images of the same sizes."""
        return list(self.images) or [Image.new("RGB", image.size, (128, 128, 128)) for image in self.layout.images]

    @cached_property
    def questions(self) -> Questions:
        """The `Questions` object that asks the model over this context."""
        text = self.vlm.text
        keys = of_own_shape(self.keys, [(site.num_kv_heads, site.key_dim) for site in text.sites])
        values = of_own_shape(self.values, [(site.num_kv_heads, site.head_dim) for site in text.sites])
        places = [device_of_part(one) for one in text.attention]
        return Questions(
            self.vlm,
            [one.to(place) for one, place in zip(keys, places, strict=True)],
            [one.to(place) for one, place in zip(values, places, strict=True)],
            self.positions,
            self.input_ids,
            self.position,
            self.prompt,
            self.layout,
            self.state,
        )

    def kept(self, layer: int) -> Kept:
        """Return the image tokens that a layer keeps.

        Raises:
            InputError: there is no such layer.
        """
        count = len(self.positions)
        if not -count <= layer < count:
            raise InputError(f"layers are 0 to {count - 1}, got {layer}")
        positions = self.positions[layer]
        chosen, owner, boxes = [], [], []
        for i, image in enumerate(self.layout.images):
            here = torch.isin(image.positions, positions)
            chosen.append(image.positions[here])
            owner.append(torch.full((int(here.sum()),), i))
            boxes.append(image.token_boxes()[here.numpy()])
        return Kept(torch.cat(chosen), torch.cat(owner), np.concatenate(boxes))

    def kept_counts(self) -> Tensor:
        """Return how many tokens of each image, or moment of a video, each layer keeps, int64 [S, images].

        The columns are in the order of `layout.images`, whose `moment` says which frames they are.
        """
        counts = [torch.isin(self.positions, image.positions).sum(1) for image in self.layout.images]
        return torch.stack(counts, 1)

    def describe(self, *, max_new_tokens: int = 300, **options: Any) -> Answer:
        """Answer the prompt of the first turn itself from what the context keeps.

        The answer's tokens see the kept tokens of the prompt and one another. Its first token is that of the answer
        from the whole image, as it follows from the prompt's last token, which saw everything (arXiv 2411.17491,
        figure 9). With `keep=1.0` the answer is that of `VLM.generate`.

        Args:
            max_new_tokens: the most tokens that the answer may have.
            options: options of transformers' `generate`, for one sequence and one beam.

        Raises:
            InputError: the context was saved by a release that did not keep the first token.
        """
        if self.first_token is None:
            raise InputError("this context does not hold the first token of a description: make it again")
        questions, settings = self.questions, self.vlm.settings(max_new_tokens, options)
        sequence = torch.cat([self.input_ids, torch.tensor([self.first_token])])
        questions.check_window(max_new_tokens)
        if max_new_tokens > 1 and self.first_token not in settings.end_ids:
            session = questions.decoder(1, max_new_tokens)
            ids, whole = [[self.first_token]], [sequence]
            with questions.running(), session.recording():
                for said in questions.generate(session, ids, whole, settings, max_new_tokens - 1):
                    sequence = sequence if said is None else said[2][0].cpu()
        layout = questions.layout(len(self.input_ids))
        return answer_of(sequence, layout, self.vlm.processor.tokenizer, settings, max_new_tokens)

    def ask(self, question: str, *, max_new_tokens: int | None = None, **options: Any) -> Answer:
        """Answer a question.

        Args:
            question: the question.
            max_new_tokens: the most tokens that the answer may have.
            options: options of transformers' `generate`, for one sequence and one beam.

        Returns:
            The answer.
        """
        return self.ask_many([question], max_new_tokens=max_new_tokens, **options)[0]

    def ask_many(
        self, questions: Sequence[str], *, max_new_tokens: int | None = None, batch_size: int = _BATCH, **options: Any
    ) -> list[Answer]:
        """Answer several questions, in batches over one copy of the prefix.

        Each question is answered as if asked alone, except that questions sampled together draw from one stream of
        random numbers.

        Args:
            questions: the questions.
            max_new_tokens: the most tokens that each answer may have.
            batch_size: how many questions are answered at a time.
            options: as in `ask`.

        Returns:
            The answers, in the order of the questions.

        Raises:
            InputError: there is no question, or one is empty or too long for the model's window.
        """
        if isinstance(questions, str):
            raise InputError("ask_many takes a list of questions; for a single one call ask")
        if not questions:
            raise InputError("no question was given; give a list of them")
        if batch_size < 1:
            raise InputError(f"batch_size is at least 1, got {batch_size}")
        settings = self.vlm.settings(max_new_tokens, options)
        ids = [self.questions.ids(question, settings) for question in questions]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # similar lengths in a batch need less padding
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            made = self.questions.answers([ids[i] for i in part], settings)
            answers |= dict(zip(part, made, strict=True))
        return [answers[i] for i in range(len(ids))]

    def chat(self) -> Chat:
        """Start a conversation over this context, in which each question sees the earlier questions and answers."""
        return Chat(self)

    @renamed_parameters(norm="final_norm")
    def stream(
        self,
        question: str,
        *,
        explain: bool = False,
        final_norm: str = "frozen",
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Stream:
        """Answer token by token; see `VLM.stream`."""
        vlm = self.vlm
        check_norm(final_norm)
        settings = vlm.settings(max_new_tokens, options)
        settings.check_single("stream")
        ids = self.questions.ids(question, settings)
        session = self.questions.decoder(1)
        sequence = torch.cat([self.input_ids, torch.tensor(ids)])
        limit = settings.limit(len(sequence))
        stream = Stream(
            vlm=vlm,
            layout=self.questions.layout(len(sequence)),
            prompt=question,
            images=self.canvases,
            explain=explain,
            final_norm=final_norm,
            settings=settings,
            over_context=True,
        )

        def start() -> Iterator[Pass | None]:
            passes = self.questions.generate(session, [ids], [sequence], settings, limit)
            yield next(passes)  # type: ignore[misc]
            for count in itertools.count(len(sequence)):
                with session.recording(int(explain)) as record:
                    said = next(passes, None)
                if said is None:
                    return
                token = int(said[0][0])
                log_prob = said[1][0, token] - said[1][0].logsumexp(-1)
                trace = partial(self.questions.trace, session, record, 1, count) if explain else None
                yield Pass(token, float(log_prob), said[2][0], not bool(said[3][0]), trace)

        stream.begin(start)
        return stream

    @renamed_parameters(norm="final_norm")
    def explain(
        self,
        question: str,
        answer: str | Sequence[int] | None = None,
        *,
        final_norm: str = "frozen",
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Explanation:
        """Explain an answer, generated or given, over the kept tokens.

        Image patches that were dropped have score 0. See `VLM.explain`; this explanation cannot be verified.
        """
        vlm = self.vlm
        check_norm(final_norm)
        settings = vlm.settings(max_new_tokens, options)
        ids = self.questions.ids(question, settings)
        session = self.questions.decoder(1)
        sequence = torch.cat([self.input_ids, torch.tensor(ids)])
        layout, limit = self.questions.layout(len(sequence)), settings.limit(len(sequence))
        if answer is None:
            with self.questions.running(), session.recording(1) as record:
                for said in self.questions.generate(session, [ids], [sequence], settings, limit):
                    sequence = sequence if said is None else said[2][0]
        else:
            nothing_generated(options)
            given = vlm.prompts.answer_ids(answer)
            sequence = torch.cat([sequence, given.cpu()])
            self.questions.check_window(len(ids) + len(given))
            with self.questions.running(), session.recording(len(given)) as record:
                session.read([[*ids, *given[:-1].tolist()]])
        said_text = answer_of(sequence, layout, vlm.processor.tokenizer, settings, limit)
        if answer is not None:
            said_text = replace(said_text, finish_reason=None)
        if not said_text.token_ids:
            raise InputError("the answer is empty: there is no token to explain; ask another question")
        count = len(said_text.token_ids)
        trace = self.questions.trace(session, record, count, len(said_text.input_ids) - 1)
        return Explanation.of(vlm, trace, said_text, prompt=question, images=self.canvases, final_norm=final_norm)

    def save(self, path: str | os.PathLike[str], storage: str = "full") -> dict[str, float]:
        """Write the context to a .safetensors file, which appears whole or not at all.

        Args:
            path: the file.
            storage: "full" stores keys and values in the model's type. "int8" takes a quarter of the space of float32
                with a small error; keys are scaled by channel, values by token.

        Returns:
            With "int8" the relative errors (root mean square) of keys and values, otherwise an empty dict.
        """
        return file_format.save(vars(self), path, storage)

    @classmethod
    def load(cls, path: str | os.PathLike[str], vlm: ModelRunner, images: Sequence[Any] = ()) -> Context:
        """Read a saved context.

        Args:
            path: the file.
            vlm: the model that the context was made with.
            images: the images or their files, if they are to be drawn on.

        Raises:
            InputError: the file is missing, damaged, not a context or of a newer format, or the model or its type is
                another.
        """
        return cls(**file_format.load(path, vlm, images))


class Chat:
    """A conversation over a context, for use in one thread.

    Attributes:
        context: the context.
        turns: the answers so far.
    """

    def __init__(self, context: Context):
        self.context = context
        self.turns: list[Answer] = []
        self._session = context.questions.decoder(1)
        self._sequence = context.input_ids
        self._unread: list[int] = []  # the last answer token, which no forward pass has read yet

    def ask(self, question: str, *, max_new_tokens: int | None = None, **options: Any) -> Answer:
        """Answer a question that may refer to the earlier ones; options as in `Context.ask`."""
        questions, vlm = self.context.questions, self.context.vlm
        settings = vlm.settings(max_new_tokens, options)
        ids = questions.ids(question, settings)
        sequence = torch.cat([self._sequence, torch.tensor([*self._unread, *ids])])
        limit = settings.limit(len(sequence))
        questions.check_window(self._session.length + len(self._unread) + len(ids) + limit)
        layout = questions.layout(len(sequence))
        before = self._session.mark()
        try:
            with questions.running(), self._session.recording():
                for said in questions.generate(self._session, [[*self._unread, *ids]], [sequence], settings, limit):
                    sequence = sequence if said is None else said[2][0].cpu()
            answer = answer_of(sequence, layout, vlm.processor.tokenizer, settings, limit)
        except BaseException:
            self._session.back(before)  # restore the state before the question
            raise
        # the last token was not read; a stop token is dropped, since the chat template adds its own end of turn
        self._sequence, last = sequence[:-1], int(sequence[-1])
        self._unread = [] if last in settings.stop_ids else [last]
        self.turns.append(answer)
        return answer
