"""Explanation: the scores of one answer, with the causal check, the logit lens and files."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import InputError
from ..core.notebook import Displayed, NotPickled, frame, picture, plot_image, show_html, table
from ..drawing.boxes import put_boxes
from ..drawing.chart_fonts import set_fonts
from ..drawing.heatmap import overlay
from ..knockout.rule import Knockout
from ..models.provenance import made_with
from ..runtime.answer import Answer
from ..runtime.model_runner import ModelRunner
from ..runtime.static_step import StepScores
from ..runtime.trace import Trace
from . import export, logit_lens
from .figure import draw_sheet, draw_token, token_map
from .patch_words import PatchWords, patch_words
from .registry import DEFAULT, HEATMAP_METHODS, Heads
from .replay import Replay
from .scores import Scores
from .text_map import TextMap, sinks, text_map
from .verification import Verification
from .verify import verify
from .video_maps import VideoMaps

_DRAWN = 16  # most tokens whose maps a notebook shows by itself
_LISTED = 64  # most tokens in the table that it shows otherwise


def nothing_generated(options: dict[str, Any]) -> None:
    """Raise InputError if generation options are given together with an answer."""
    if options:
        raise InputError(f"{', '.join(options)} cannot be used with a given answer: nothing is generated")


def _place(
    scores: Scores, token: int | str, layer: int, head: int | str | None, position: int | None
) -> logit_lens.Place:
    return logit_lens.Place(scores.token_index(token), layer, "residual" if head is None else head, position)


class Explanation(Scores, Displayed, NotPickled):  # long: what can be asked of it is a method each
    """Explains why each token of one answer was generated: scores, heatmaps, causal check, logit lens and files."""

    _INSTEAD = "save it, as .safetensors or .json, and read the numbers there"

    @classmethod
    def of(  # noqa: PLR0913
        cls,
        runner: ModelRunner,
        trace: Trace,
        answer: Answer,
        *,
        prompt: str,
        images: list[Any],
        final_norm: str,
        replay: Replay | None = None,
        knockouts: Sequence[Knockout] = (),
        known: StepScores | None = None,
    ) -> Explanation:
        """Build the explanation of an answer that a runner's model gave while it was recorded."""
        return cls(
            text_model=runner.text,
            operators=runner.operators,
            trace=trace,
            answer=answer,
            word_of=runner.token_bytes.text,
            encode=runner.prompts.answer_ids,
            prompt=prompt,
            images=images,
            final_norm=final_norm,
            backend=runner.backend,
            replay=replay,
            made_with=partial(made_with, runner.model),
            knockouts=knockouts if replay is None else replay.rules,
            known=known,
        )

    def __repr__(self) -> str:
        images = "no image" if not self.images else f"{len(self.images)} image{'s' * (len(self.images) > 1)}"
        return f"Explanation({self.text!r}, {len(self.tokens)} tokens, {images}, prompt={self.prompt!r})"

    def provenance(self, method: str = DEFAULT) -> dict[str, Any]:
        """Return what the explanation was made with, and how, as every file of `save` says it.

        Args:
            method: the method of the maps.

        Returns:
            The model (its name, revision, type and fingerprint), dtype, device, versions, date, question, answer,
            final norm, knockouts, and the method and heads of the maps, ready for JSON.
        """
        return export.provenance(self, method)

    def _repr_html_(self) -> str:
        about = table([("question", self.prompt), ("answer", self.text)])
        if self.images and len(self.tokens) <= _DRAWN:
            return about + picture(self.image(), f"The maps of the words of \u201c{self.text}\u201d")
        rows = [
            (i, label, ", ".join(f"{layer}.{head} {score:+.2f}" for layer, head, score in self.top_heads(i, 4)))
            for i, label in enumerate(self.labels[:_LISTED])
        ]
        rest = len(self.labels) - len(rows)
        note = f"<p>and {rest} more tokens</p>" if rest else ""
        return about + table(rows, ("", "token", "best heads: layer.head, increase of log p")) + note

    def show(self) -> None:
        """Show the page of `save` below the cell of a notebook, to click through; in a terminal, print one line."""
        if not self.images:
            super().show()
            return
        page = html.escape(export.encoded(self, "html").decode())
        show_html(f'<iframe srcdoc="{page}" style="width: 100%; height: 760px; border: 0"></iframe>', repr(self))

    def image(
        self, token: int | str | None = None, method: str = DEFAULT, heads: int = 10, without: Tensor | None = None
    ) -> Image.Image:
        """Return the picture that `save` writes as .png: one token's map, or a sheet of all tokens.

        Args:
            token: the token; all of them by default.
            method, heads: as in `heatmap`.
            without: positions whose patches are marked and left out of a second map, such as `sinks`; for one token.
        """
        HEATMAP_METHODS.get(method)
        if token is None and len(self.tokens) > 1 and self.images and without is None:
            return draw_sheet(self, heads, method)
        return draw_token(self, self.token_index(token or 0), heads, method, without)

    def plot(
        self, token: int | str = 0, method: str = DEFAULT, heads: Heads = 10, image: int = 0, ax: Any = None
    ) -> Any:
        """Draw one token's map over an image into matplotlib axes, and return them.

        Args:
            token, method, heads, image: as in `heatmap`.
            ax: the axes; new ones by default.

        Raises:
            InputError: as in `heatmap`, or matplotlib is not installed.
        """
        HEATMAP_METHODS.get(method)
        self.image_layout(image)
        index, side = self.token_index(token), max(self.images[image].size)
        grid, box, boxes = token_map(self, index, method, heads, image)
        drawn = overlay(self.images[image], grid, box, max(0.0, float(grid.max())), side)
        put_boxes(drawn, boxes, 1.0)
        ax = plot_image(drawn, ax)
        ax.set_title(self.labels[index])
        set_fonts(ax)
        return ax

    def video(self, number: int = 0) -> VideoMaps:
        """Return the maps of a video: of each moment, their curve over time, and where they are highest.

        Args:
            number: the index of the video in the prompt.

        Raises:
            InputError: there is no such video.
        """
        return VideoMaps(self, number)

    def to_frame(self) -> Any:
        """Return the scores of all heads as a pandas DataFrame, one row for each token, layer and head.

        The columns are "token" (its index), "text", "layer", "head" and "score", the increase of log p.
        """
        scores = self.head_scores
        places = torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist()
        rows = [
            (token, self.labels[token], layer, head, score)
            for (token, layer, head), score in zip(places, scores.flatten().tolist(), strict=True)
        ]
        return frame(rows, ("token", "text", "layer", "head", "score"))

    def verify(
        self,
        top: float = 0.05,
        controls: int = 8,
        *,
        tokens: Sequence[int | str] | None = None,
        heads: Heads = 10,
        method: str = DEFAULT,
    ) -> list[Verification]:
        """Check causally whether a word depends on the patches that its map marks as high.

        The highest `top` of the image's tokens are knocked out (image patches -> query and generated, in all layers).
        The change of log p(token) is compared with the change for the same number of random patches, `controls` times,
        and for the lowest patches. All variants run in one batch, over the explanation's own keys and values of the
        tokens before the query.

        Args:
            top: the share of the image's tokens to knock out, between 0 and 1.
            controls: how many random sets of patches to compare with.
            tokens: the tokens to check, by index or text; all by default.
            heads: the heads of the map, as in `heatmap`.
            method: the method of the map, as in `heatmap`. A verdict is shown only with the map that was checked.

        Returns:
            One `Verification` per token. They are also kept in `verification`, which `save` shows.

        Raises:
            InputError: an argument is out of range, the prompt has no image, or the explanation cannot run the model
                again.
        """
        HEATMAP_METHODS.get(method)
        chosen = range(len(self.tokens)) if tokens is None else [self.token_index(token) for token in tokens]
        self.verification = [verify(self, token, top, controls, heads, method) for token in chosen]
        return self.verification

    def project(
        self,
        token: int | str,
        layer: int,
        head: int | str | None = None,
        position: int | None = None,
        *,
        space: str = "unembedding",
        final_norm: str | None = None,
        k: int = 10,
    ) -> list[tuple[str, float]]:
        """Return the k words that a vector is closest to (arXiv 2411.10950).

        Without `head` the vector is the residual input of `layer`, at the token's row, or at any earlier `position`: at
        layer 0 of an image token it is the visual embedding. With a number as `head` it is what this head writes to the
        token's row, with `position` what it writes there from that position. "attention" and "mlp" are what the layer's
        attention and the rest of the layer add, at the token's row or at `position`.

        Vectors at other positions, and those of "attention" and "mlp", are computed by running the sequence again.

        Args:
            token: the answer token.
            layer: the layer; for the residual stream, `num_layers` stands for the output of the last layer.
            head: a head, "residual" (the default), "attention" or "mlp".
            position: a position of the sequence before the token.
            space: "unembedding" or "embedding". With "unembedding" the values of a residual vector are the words'
                log-probabilities after the final norm (the logit lens). Those of what is added are the changes of the
                words' logits, before any soft cap, under the statistics of the final row. With "embedding" they are dot
                products with the words' input embeddings.
            final_norm: what the final norm does in the unembedding space: "own" (the vector's own statistics, and
                log-probabilities), "frozen" (the statistics of the final row, and logits) or "none". By default it is
                "own" for the residual stream and "frozen" for what is added to it.
            k: how many words to return.

        Returns:
            A list of (word, value), largest value first.

        Raises:
            InputError: there is no such token, layer, head, position, space or norm, k is below 1, or the vector needs
                another run that the explanation cannot make.
        """
        place = _place(self, token, layer, head, position)
        return logit_lens.project(self, place, space, final_norm, k)

    def ranks(
        self,
        words: Sequence[str | int],
        token: int | str,
        layer: int,
        head: int | str | None = None,
        position: int | None = None,
        *,
        space: str = "unembedding",
        final_norm: str | None = None,
    ) -> list[tuple[int, float]]:
        """Return where some words stand among all words for a vector.

        One over the rank is the reciprocal rank. The difference of the values of two words is the logit difference of
        arXiv 2411.10950, equation 7, with `final_norm="frozen"`.

        Args:
            words: the words, or token ids. Of a word of several tokens it is the first.
            token, layer, head, position, space, final_norm: as in `project`.

        Returns:
            A list of (rank, value), with rank 1 for the word of the largest value.

        Raises:
            InputError: as in `project`.
        """
        ids = [word if isinstance(word, int) else int(self.encode(word)[0]) for word in words]
        return logit_lens.ranks(self, _place(self, token, layer, head, position), ids, space, final_norm)

    def text_map(self, token: int | str, heads: Heads = 10) -> TextMap:
        """Return how much each token of the prompt and of the earlier answer raised a token's probability.

        A notebook shows it as coloured text. It works for prompts of text alone as well.

        Args:
            token: the answer token.
            heads: as in `position_scores`.
        """
        return text_map(self, self.token_index(token), heads)

    def sinks(self, factor: float = 5.0) -> Tensor:
        """Return the attention sinks: positions that draw attention whatever they stand for.

        They are found by their norm: a position is one if its residual vector after some layer is more than `factor`
        times as long as the median over the prompt's positions (massive activations, arXiv 2402.17762; registers of
        vision transformers, arXiv 2309.16588). The model runs once more.

        Args:
            factor: how much longer than the median.

        Returns:
            The positions in the prompt, int64, ascending.

        Raises:
            InputError: `factor` is at most 1, or the explanation cannot run the model again.
        """
        return sinks(self, factor)

    def patch_words(self, image: int = 0, k: int = 3) -> PatchWords:
        """Return the words that each token of an image stands for, layer by layer (arXiv 2411.10950, section 3.3).

        Args:
            image: the index of the image.
            k: the number of words of each token and layer.
        """
        return patch_words(self, self.layout.images[image].positions, k)

    def save(
        self,
        path: str | os.PathLike[str],
        token: int | str | None = None,
        method: str = "logprob",
        patch_words: bool = False,
        without: Tensor | None = None,
    ) -> None:
        """Write the explanation to a file, which appears whole or not at all.

        Args:
            path: the file. A .png shows one token's map, or a sheet of all tokens. A .html is one page to click
                through. A .json or .safetensors file contains all numbers. A .webp or .mp4 plays a video with the map
                of one token, or once for each token.
            token: the token that a picture or an animation shows alone, or that a .html shows first, by index or text.
            method: the method of the maps, as in `heatmap`. Pages and number files also contain the maps of "logprob"
                and "attention".
            patch_words: whether a .html shows the words of each patch, layer by layer, under the pointer. It takes one
                more run of the model.
            without: as in `image`; for a .png.

        Raises:
            InputError: the file cannot be written, or there is no such token or method.
        """
        HEATMAP_METHODS.get(method)
        export.save(self, path, None if token is None else self.token_index(token), method, patch_words, without)
