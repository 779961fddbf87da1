"""Context: what is kept of an image, to be asked again and again (image re-prompting, arXiv 2411.17491)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.deprecation import renamed
from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..explain.explanation import Explanation, nothing_generated
from ..explain.scores import check_norm
from ..explain.stream import Stream
from ..models.processing import one_answer
from ..runtime.answer import Answer, answer_of
from ..runtime.hooks import Recording
from ..runtime.model_runner import ModelRunner
from ..runtime.shared_prefix import SharedPrefixDecoder
from ..runtime.trace import Trace
from . import file_format
from .questions import Questions

_BATCH = 32


@dataclass(frozen=True)
class Kept:
    """Image tokens that a layer of a context keeps: `positions` in the uncompressed prefix (int64 [K], ascending), the
    image each is of (`images`, int64 [K]), and the pixel box of each in it (`boxes`, float64 [K, 4], left, top,
    right, bottom)."""

    positions: Tensor
    images: Tensor
    boxes: np.ndarray


@dataclass(frozen=True, eq=False)
class Context:
    """Keys and values of an image's prefix, of each layer those of the text and of the kept image tokens.

    Nothing changes a context: questions keep what is theirs beside it, and several threads may ask at once (the model
    serves one at a time). Tokens keep their original positions, and a question stands where it would have stood after
    the whole prefix.

    Attributes:
        keys, values: [L, Hkv, M, D]. positions: of the kept tokens in the uncompressed prefix, int64 [L, M], ascending.
        layout, input_ids: of the uncompressed prefix (system, image and query tokens). position: of the next token, for
            the rotary embedding. prompt: of the first turn. description: what the model said to it, if that was the
            score. settings: keep, score and parts, and how many image tokens are kept. images: the images, where
            they are at hand. peak_nbytes: most bytes of keys and values held while it was made, 0 if from a file.
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

    __getattr__ = renamed(pictures="canvases")

    def __repr__(self) -> str:
        return (
            f"Context({self.num_tokens} of {self.prefix_length} tokens, {self.nbytes / 2**20:.2f} of"
            f" {self.full_nbytes / 2**20:.2f} MiB, {self.settings})"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens kept in each layer, text included."""
        return self.keys.shape[2]

    @property
    def prefix_length(self) -> int:
        """Tokens of the uncompressed system + image + query sequence."""
        return self.layout.length

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values and positions."""
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes

    @property
    def full_nbytes(self) -> int:
        """Bytes of the uncompressed prefix's keys and values."""
        return (self.keys.nbytes + self.values.nbytes) // self.num_tokens * self.prefix_length

    @property
    def canvases(self) -> list[Any]:
        """The images to draw upon: `images`, or grey ones of their sizes."""
        return list(self.images) or [Image.new("RGB", image.size, (128, 128, 128)) for image in self.layout.images]

    @property
    def questions(self) -> Questions:
        """What asks the model questions over this context."""
        return Questions(
            self.vlm,
            self.keys,
            self.values,
            self.positions,
            self.input_ids,
            self.position,
            self.prompt,
            self.layout.images,
        )

    def kept(self, layer: int) -> Kept:
        """The image tokens that a layer keeps."""
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

    def ask(self, question: str, *, max_new_tokens: int = 32, **options: Any) -> Answer:
        """Answer a question; options as in transformers' `generate`, for one sequence and one beam."""
        return self.ask_many([question], max_new_tokens=max_new_tokens, **options)[0]

    def ask_many(
        self, questions: Sequence[str], *, max_new_tokens: int = 32, batch_size: int = _BATCH, **options: Any
    ) -> list[Answer]:
        """Answer questions, `batch_size` at a time in one pass over one copy of the prefix: each as if asked alone (but
        that questions sampled together draw from one stream of random numbers).

        Raises:
            InputError: no question, an empty one, or one too long for the model's window.
        """
        if isinstance(questions, str):
            raise InputError("ask_many takes a list of questions; for a single one call ask")
        if not questions:
            raise InputError("no question was given; give a list of them")
        if batch_size < 1:
            raise InputError(f"batch_size is at least 1, got {batch_size}")
        ids = [self.questions.ids(question, max_new_tokens) for question in questions]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # neighbours of one length waste no room
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            made = self.questions.answers([ids[i] for i in part], max_new_tokens, options)
            answers |= dict(zip(part, made, strict=True))
        return [answers[i] for i in range(len(ids))]

    def chat(self) -> Chat:
        """A conversation over this context: each question sees the earlier ones and their answers."""
        return Chat(self)

    def stream(
        self, question: str, *, explain: bool = False, norm: str = "frozen", max_new_tokens: int = 32, **options: Any
    ) -> Stream:
        """Answer token by token; see `VLM.stream`."""
        vlm = self.vlm
        check_norm(norm)
        one_answer("stream", options)
        ids = self.questions.ids(question, max_new_tokens)
        session = self.questions.decoder(1)
        sequence = torch.cat([self.input_ids, torch.tensor(ids)])
        stream = Stream(
            vlm=vlm,
            layout=self.questions.layout(len(sequence)),
            prompt=question,
            images=self.canvases,
            explain=explain,
            norm=norm,
            stop_ids=vlm.prompts.stop_ids(options),
            source=_Asked(self.questions, session),
        )

        def start() -> Iterator[Any]:
            for said in self.questions.generate(session, [ids], [sequence], max_new_tokens, options):
                if said is None:
                    yield None
                    continue
                token = int(said[0][0])
                log_prob = said[1][0, token] - said[1][0].logsumexp(-1)
                yield token, float(log_prob), session, said[2][0], not bool(said[3][0])

        stream.begin(start)
        return stream

    def explain(
        self,
        question: str,
        answer: str | Sequence[int] | None = None,
        *,
        norm: str = "frozen",
        max_new_tokens: int = 32,
        **options: Any,
    ) -> Explanation:
        """Explain an answer, generated or given, against what is kept: the patches that were dropped have no score.
        See `VLM.explain`; such an explanation cannot be verified."""
        vlm = self.vlm
        check_norm(norm)
        ids = self.questions.ids(question, max_new_tokens)
        session = self.questions.decoder(1)
        sequence = torch.cat([self.input_ids, torch.tensor(ids)])
        layout = self.questions.layout(len(sequence))
        if answer is None:
            with self.questions.running(), session.recording(1) as record:
                for said in self.questions.generate(session, [ids], [sequence], max_new_tokens, options):
                    sequence = sequence if said is None else said[2][0]
        else:
            nothing_generated(options)
            given = vlm.prompts.answer_ids(answer)
            sequence = torch.cat([sequence, given.cpu()])
            self.questions.check_window(len(ids) + len(given))
            with self.questions.running(), session.recording(len(given)) as record:
                session.read([[*ids, *given[:-1].tolist()]])
        said_text = answer_of(sequence, layout, vlm.processor.tokenizer, vlm.prompts.stop_ids(options))
        if not said_text.token_ids:
            raise InputError("the answer is empty: there is no token to explain; ask another question")
        count = len(said_text.token_ids)
        trace = self.questions.trace(session, record, count, len(said_text.input_ids) - 1)
        return Explanation.of(vlm, trace, said_text, prompt=question, images=self.canvases, norm=norm)

    def save(self, path: str | os.PathLike[str], storage: str = "full") -> dict[str, float]:
        """Write the context to a .safetensors file, which appears whole or not at all.

        storage: "full", the model's type; "int8", a quarter (of float32) with a small error: keys by channel, values by
            token.

        Returns the relative errors (root mean square) of keys and values that int8 made, else nothing.
        """
        return file_format.save(vars(self), path, storage)

    @classmethod
    def load(cls, path: str | os.PathLike[str], vlm: ModelRunner, images: Sequence[Any] = ()) -> Context:
        """Read a context that was saved. `images`: the images (or their files), if they are to be drawn upon.

        Raises:
            InputError: no such file, not a context, a newer format, a damaged file, another model or type.
        """
        return cls(**file_format.load(path, vlm, images))


class _Asked:
    """What a stream over a context needs to attach and to explain."""

    def __init__(self, questions: Questions, session: SharedPrefixDecoder):
        self._questions = questions
        self._session: SharedPrefixDecoder | None = session

    def recording(self, rows: int) -> AbstractContextManager[Recording]:
        assert self._session is not None  # a closed stream computes nothing
        return self._session.recording(rows)

    def trace(self, record: Recording, cache: Any, length: int) -> Trace:
        return self._questions.trace(cache, record, 1, length)

    def close(self) -> None:
        self._session = None  # steps that are still to be explained hold it


class Chat:
    """A conversation over a context, for one thread. `turns`: the answers so far."""

    def __init__(self, context: Context):
        self.context = context
        self.turns: list[Answer] = []
        self._session = context.questions.decoder(1)
        self._sequence = context.input_ids
        self._unread: list[int] = []  # the last token said, which no pass has read yet

    def ask(self, question: str, *, max_new_tokens: int = 32, **options: Any) -> Answer:
        """Answer a question that may refer to the earlier ones; options as in `Context.ask`."""
        questions, vlm = self.context.questions, self.context.vlm
        ids = questions.ids(question, max_new_tokens)
        questions.check_window(self._session.length + len(self._unread) + len(ids) + max_new_tokens)
        sequence = torch.cat([self._sequence, torch.tensor([*self._unread, *ids])])
        layout = questions.layout(len(sequence))
        before = self._session.mark()
        try:
            with questions.running(), self._session.recording():
                for said in questions.generate(
                    self._session, [[*self._unread, *ids]], [sequence], max_new_tokens, options
                ):
                    sequence = sequence if said is None else said[2][0].cpu()
            stop = vlm.prompts.stop_ids(options)
            answer = answer_of(sequence, layout, vlm.processor.tokenizer, stop)
        except BaseException:
            self._session.back(before)  # as if it had not been asked
            raise
        # the last token was not read; a stop token is left to the template, which ends the turn in its own way
        self._sequence, last = sequence[:-1], int(sequence[-1])
        self._unread = [] if last in stop else [last]
        self.turns.append(answer)
        return answer
