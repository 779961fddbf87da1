"""Scores of an answer: which heads and which positions raised the probability of each token.

The scores are log-probability increases (arXiv 2411.10950, equation 6) of head writes and position writes. They are
exact. They are computed from the key/value cache and two recorded vectors per layer and token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..core.deprecation import renamed
from ..core.errors import InputError
from ..core.layout import ImageLayout, TokenLayout
from ..kernels import OperatorCache
from ..knockout.rule import Knockout, as_rules
from ..models.provenance import now
from ..models.text_model import TextModel, without_gradients
from ..runtime.answer import Answer
from ..runtime.static_step import StepScores
from ..runtime.trace import Trace
from .box_weights import BoxWeights
from .registry import DEFAULT, HEATMAP_METHODS, Heads, HeatmapMethod
from .replay import Replay
from .verification import Verification
from .write_scores import WriteScores

in_inference = without_gradients(attrgetter("text_model"))  # for functions of a `Scores`


def check_norm(final_norm: str) -> None:
    """Raise InputError for an unknown norm."""
    if final_norm not in ("frozen", "own"):
        raise InputError(f"final_norm is 'frozen' or 'own', got {final_norm!r}")


def labels_of(tokens: Sequence[str], token_ids: Sequence[int], word_of: Callable[[int], str]) -> list[str]:
    """Return tokens as they are shown: without spaces around, and a part of a character as its bytes.

    A token of spaces alone is an open box, and one with the end of a line an arrow.

    Args:
        tokens: The text that each token adds to the answer; that of a part of a character is empty.
        token_ids: Their ids.
        word_of: Returns the text of a token by itself.
    """
    shown = [text.strip() or word_of(i) for text, i in zip(tokens, token_ids, strict=True)]
    return [text.strip() or ("\u21b5" if "\n" in text else "\u2423") for text in shown]


class Scores:
    """Scores and heatmaps of one answer.

    Methods take a token by its index in `tokens`, or by its text if that is unique. Heatmap methods, the causal check,
    the logit lens and the drawings read this object.

    Attributes:
        tokens: the answer's tokens, as texts.
        token_ids: the answer's tokens, as ids.
        labels: the answer's tokens as they are shown, see `labels_of`.
        text: the whole answer.
        layout: the layout of the whole sequence, answer included.
        input_ids: the token ids of the whole sequence, answer included, int64 [N].
        prompt: the question.
        images: the images, as PIL images.
        final_norm: "frozen" or "own", the statistics of the final norm.
        trace: the recorded rows and the key/value cache, a `Trace`.
        text_model: the model's decoder layers, output projections, final norm and unembedding, a `TextModel`.
        unembedding: the final norm and the unembedding in the form that the kernels take, an `Unembedding`.
        word_of: a function from a token id to the text of that token by itself.
        encode: a function from a text to its token ids.
        verification: the results of the last `verify`; empty before.
        unreached_layers: as in `Answer`.
        finish_reason: as in `Answer`.
        made: the date and time, in UTC.
        made_with: returns what the model is, see `models.provenance.made_with`.
        knockouts: the knockouts of the answer, as texts.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        text_model: TextModel,
        operators: OperatorCache,
        trace: Trace,
        answer: Answer,
        word_of: Callable[[int], str],
        encode: Callable[[str], Any],
        prompt: str,
        images: list,
        final_norm: str,
        backend: str = "auto",
        replay: Replay | None = None,
        made_with: Callable[[], dict[str, Any]] = dict,
        knockouts: Sequence[Knockout] = (),
        known: StepScores | None = None,
    ):
        self.tokens: list[str] = answer.tokens
        self.token_ids: list[int] = answer.token_ids
        self.labels = labels_of(answer.tokens, answer.token_ids, word_of)
        self.text: str = answer.text
        self.layout: TokenLayout = answer.layout
        self.input_ids: Tensor = answer.input_ids
        self.unreached_layers: tuple[int, ...] = answer.unreached_layers
        self.finish_reason: str | None = answer.finish_reason
        self.prompt = prompt
        self.images = images
        self.final_norm = final_norm
        text_model.check_writes()
        self.text_model = text_model
        self.trace = trace
        self.word_of = word_of
        self.encode = encode
        self.unembedding = text_model.unembedding()
        self.verification: list[Verification] = []
        # set only for explanations by a joint model
        self.boxes_of: Callable[[int, str | None, int], BoxWeights] | None = None
        self._replay = replay
        self.made, self.made_with = now(), made_with
        self.knockouts = [str(rule) for rule in as_rules(knockouts)]
        self._writes = WriteScores(
            text_model, self.unembedding, trace, answer.token_ids, final_norm, operators, backend
        )
        self._head_scores: Tensor | None = None
        self._position_scores: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self._attributions: dict[tuple[HeatmapMethod, int, int | None, str], Tensor] = {}
        if known is not None:
            self._head_scores, self._position_scores = _of_step(text_model, len(self.input_ids), *known)

    __getattr__ = renamed(token_values="attribution", norm="final_norm")

    @property
    def num_layers(self) -> int:
        return len(self.text_model.layers)

    @property
    def num_heads(self) -> int:
        return self.text_model.num_heads

    @property
    @torch.no_grad()
    def head_scores(self) -> Tensor:
        """The log-probability increase of every head's write, float32 [tokens, layers, heads], on the CPU.

        It is 0 in layers without attention, whose heads write nothing.
        """
        if self._head_scores is None:
            self._head_scores = self._writes.heads()
        return self._head_scores

    def top_heads(self, token: int | str, k: int = 10) -> list[tuple[int, int, float]]:
        """Return the k heads with the largest scores.

        Returns:
            A list of (layer, head, score), largest score first.

        Raises:
            InputError: there is no such token, or k is below 1.
        """
        if k < 1:
            raise InputError(f"k is at least 1, got {k}")
        layers = self.text_model.site_layers
        scores = self.head_scores[self.token_index(token)][list(layers)].flatten()
        best = scores.topk(min(k, len(scores)))
        return [
            (layers[i // self.num_heads], i % self.num_heads, score)
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    @torch.no_grad()
    def position_scores(self, token: int | str, heads: Heads = 10) -> Tensor:
        """Return the log-probability increase of each position's write.

        Args:
            token: the answer token.
            heads: a number (that many of the best heads), a list of (layer, head), or "all" (layer by layer).

        Returns:
            float32 [heads, positions], on the CPU, over all positions of `input_ids`. Positions that the token cannot
            see, or that a context dropped, are 0.
        """
        index = self.token_index(token)
        wanted = _chosen_heads(self, index, heads)
        missing = [head for head in wanted if (index, head) not in self._position_scores]
        if missing:
            scores = self._writes.positions(index, missing, len(self.input_ids))
            self._position_scores |= {(index, head): row for head, row in zip(missing, scores.unbind(), strict=True)}
            if missing == wanted:
                return scores.clone()
        return torch.stack([self._position_scores[index, head] for head in wanted])

    @torch.no_grad()
    def attention(self, token: int | str) -> Tensor:
        """Return the attention weights of a token's row.

        Returns:
            float32 [layers, heads, positions], on the CPU. The weights sum to 1 over the positions that the row sees;
            other positions are 0, and so are layers without attention.
        """
        index, text = self.token_index(token), self.text_model
        sites = [site for site in range(len(text.sites)) for _ in range(self.num_heads)]
        every = [self.trace.attention(index, site) for site in range(len(text.sites))]
        if text.split is not None:
            text.split.meet()
            every = [text.split.gather(torch.stack(every), 1).flatten(0, 1)]
        alphas = torch.cat([one.to(self.trace.residual.device) for one in every])
        found = self.trace.spread(alphas, sites, len(self.input_ids)).unflatten(0, (len(text.sites), -1))
        if len(text.sites) == self.num_layers:
            return found
        whole = torch.zeros(self.num_layers, *found.shape[1:])
        whole[list(text.site_layers)] = found
        return whole

    def heatmap(self, token: int | str, method: str = DEFAULT, heads: Heads = 10, image: int = 0) -> Tensor:
        """Return a heatmap over an image's tokens.

        A thumbnail's tokens are spread over the cells that they cover.

        Args:
            token: the answer token to explain.
            method: "logprob" (the sum of the position scores of `heads`), "attention", "rollout", "relevancy", "tam",
                "gradient-input", "random", "exhaustive", or a method that `heatmap_method` added. Most of them run the
                model again, which is not possible for explanations by a stream or a context. "relevancy" and
                "gradient-input" hold the activations of all layers at once. "gradient-alignment" needs an explanation
                by a joint model, see `box_weights`.
            heads: for "logprob", a number (that many of the best heads), a list of (layer, head), or "all".
            image: the index of the image, from 0.

        Returns:
            float32 [rows, cols], in the shape of `layout.images[image].grid`.

        Raises:
            InputError: there is no such token, method, head or image, or the method cannot explain this answer.
        """
        return self.image_layout(image).to_grid(self.attribution(token, method, heads, image))

    def attribution(self, token: int | str, method: str = DEFAULT, heads: Heads = 10, image: int = 0) -> Tensor:
        """Return the numbers that `heatmap` lays on the grid, one per image token; arguments as there.

        Returns:
            float32 [n], on the CPU.
        """
        found = HEATMAP_METHODS.get(method)
        where = self.image_layout(image)
        index = self.token_index(token)
        # what is the same for all images, or for all heads, is computed once
        key = found, index, None if found.every_position else image, repr(heads) if found.takes_heads else ""
        if key not in self._attributions:
            self._attributions[key] = found.attribution(self, index, where, heads)
        return _of_image(found, self._attributions[key], where)

    def box_weights(self, token: int | str, query: str | None = None, image: int = 0) -> BoxWeights:
        """Return how far a detector's boxes agree with a token (gradient alignment, arXiv 2405.14612).

        The explanation must be one by `mllm_fast.joint.JointModel`.

        Args:
            token: the answer token to explain.
            query: the text that the detector looks for; by default "a photo of a WORD" with the token's own word.
            image: the index of the image, from 0.

        Raises:
            InputError: the explanation has no detector, or there is no such token or image.
        """
        if self.boxes_of is None:
            raise InputError(
                "gradient alignment needs a detector: explain by mllm_fast.joint.JointModel (--joint on the command"
                " line)"
            )
        self.image_layout(image)
        return self.boxes_of(self.token_index(token), query, image)

    @property
    def replay(self) -> Replay:
        """The `Replay` that runs the sequence again.

        Raises:
            InputError: the explanation was made by a stream or over a context.
        """
        if self._replay is None:
            raise InputError(
                "explanations made by stream, or of a context, keep too little to run the model again: use VLM.explain"
            )
        return self._replay

    def verified(self, token: int, method: str = DEFAULT, heads: Heads = 10) -> Verification | None:
        """Return the last `verify` result for a token's map of this method.

        For "logprob" the map must also be of the same heads. The result is None if the map was not checked.
        """
        for one in self.verification:
            if one.token == token and one.method == method and (method != DEFAULT or one.heads == heads):
                return one
        return None

    def forget(self) -> None:
        """Drop all computed scores, so that they are computed again when needed."""
        self._head_scores = None
        self._writes.forget()
        self._position_scores, self._attributions = {}, {}

    def token_index(self, token: int | str) -> int:
        """Return the index of a token that is given by its index (negative from the end) or by its text.

        Raises:
            InputError: there is no such token, or the text is not unique.
        """
        if isinstance(token, str):
            given = token.strip()
            both = zip(self.tokens, self.labels, strict=True)
            found = [i for i, (text, label) in enumerate(both) if given in (text.strip(), label)]
            if len(found) == 1:
                return found[0]
            listed = ", ".join(f"{i}: {text!r}" for i, text in enumerate(self.labels))
            problem = "is not in the answer" if not found else f"stands {len(found)} times; give its index"
            raise InputError(f"the token {token!r} {problem}; the answer's tokens are {listed}")
        count = len(self.tokens)
        if not -count <= token < count:
            raise InputError(f"the token's index is 0 to {count - 1}, got {token}")
        return token % count

    def image_layout(self, image: int = 0) -> ImageLayout:
        """Return the layout (tokens and tiles) of an image.

        Raises:
            InputError: there is no such image.
        """
        if not self.layout.images:
            raise InputError("the prompt has no image to lay a map on")
        if not 0 <= image < len(self.layout.images):
            raise InputError(f"image is 0 to {len(self.layout.images) - 1}, got {image}")
        return self.layout.images[image]


def _of_step(
    text: TextModel, length: int, heads: Tensor, best: Tensor, positions: Tensor
) -> tuple[Tensor, dict[tuple[int, tuple[int, int]], Tensor]]:
    """Return the scores of an answer's only token, which its pass computed, as `Scores` keeps them.

    Args:
        text: The text part of the model.
        length: The length of the sequence.
        heads: The scores of every site's heads, [S, H].
        best: Numbers site * H + head of some heads, int64 [k].
        positions: Their position scores, [k, N].
    """
    layers, each = list(text.site_layers), text.num_heads
    scores = torch.zeros(1, len(text.layers), each)
    scores[0, layers] = heads.float()
    whole = torch.zeros(len(best), length)
    whole[:, : positions.shape[1]] = positions
    named = [(layers[i // each], i % each) for i in best.tolist()]
    return scores, {(0, head): row for head, row in zip(named, whole.unbind(), strict=True)}


def _of_image(method: HeatmapMethod, values: Any, image: ImageLayout) -> Tensor:
    """Return the numbers of an image's tokens from what a heatmap method returned, float32 [n], on the CPU.

    Raises:
        InputError: The method returned something else than it should.
    """
    own = image.positions
    needed = 1 + max(own.tolist(), default=-1) if method.every_position else len(own)
    fits = isinstance(values, Tensor) and values.dim() == 1
    if not fits or (len(values) < needed if method.every_position else len(values) != needed):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        what = "every position up to the token's row, at least" if method.every_position else "an image token, a tensor"
        raise InputError(f"the heatmap method {method.name!r} gives one number for {what} [{needed}]; got {got}")
    own_values = values[own.to(values.device)] if method.every_position else values
    return own_values.to("cpu", torch.float32, copy=True)


def check_attention_everywhere(scores: Scores, method: str) -> None:
    """Raise InputError for a method that follows attention from layer to layer if a layer has none."""
    others = scores.text_model.findings.others
    if others:
        raise InputError(
            f"{method!r} follows attention through every layer, and {len(others)} layers of this model have none"
            f" ({next(iter(others.values()))}); use 'logprob', 'attention' or 'gradient-input'"
        )


def _chosen_heads(scores: Scores, index: int, heads: Heads) -> list[tuple[int, int]]:
    if heads == "all":
        return [(layer, head) for layer in scores.text_model.site_layers for head in range(scores.num_heads)]
    if isinstance(heads, int) and not isinstance(heads, bool):
        return [(layer, head) for layer, head, _ in scores.top_heads(index, heads)]
    if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads:
        raise InputError(f"heads is a number, a list of (layer, head) or 'all', got {heads!r}")
    wanted = [(int(layer), int(head)) for layer, head in heads]  # type: ignore[str-unpack]
    for layer, head in wanted:
        if not (0 <= layer < scores.num_layers and 0 <= head < scores.num_heads):
            raise InputError(
                f"head ({layer}, {head}) does not exist: layers are 0 to {scores.num_layers - 1},"
                f" heads 0 to {scores.num_heads - 1}"
            )
        scores.text_model.site(layer)
    return wanted
