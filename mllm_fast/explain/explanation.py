"""Explanation: which heads and which positions raised the probability of each answer token.

Scores are log-probability increases (arXiv 2411.10950, equation 6) of head writes and position writes,
exact, computed from the KV cache and two recorded vectors a layer and token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InputError, check_choice
from ..core.layout import ImageLayout, TokenLayout
from ..kernels import Base, OperatorCache, logprob_increase, weight_state, wide_type
from ..models.text_model import TextModel
from ..runtime.trace import Trace
from .names import DEFAULT
from .registry import WITH_DETECTOR, find

if TYPE_CHECKING:
    from ..runtime.answer import Answer
    from .box_weights import BoxWeights
    from .verify import Replay, Verification

Heads = int | str | Sequence[tuple[int, int]]
_WRITE_ELEMENTS = 1 << 24  # of the writes handed to the kernel at a time: 64 MiB of float32


def check_norm(norm: str) -> None:
    """Raise InputError for an unknown norm."""
    if norm not in ("frozen", "own"):
        raise InputError(f"norm is 'frozen' or 'own', got {norm!r}")


def nothing_generated(options: dict[str, Any]) -> None:
    """Raise InputError for options of a generation where the answer is given."""
    if options:
        raise InputError(f"{', '.join(options)} cannot be used with a given answer: nothing is generated")


class Explanation:
    """Scores of one answer. A token is named by its index in `tokens`, or by its text where that is unique.

    Attributes:
        tokens, token_ids: of the answer. layout, input_ids: of the whole sequence, answer included.
        text: the answer. prompt: the question. images: the pictures, as PIL images. norm: "frozen" or "own".
        verification: what `verify` found, empty before.
    """

    def __init__(
        self,
        *,
        vlm_text: TextModel,
        operators: OperatorCache,
        trace: Trace,
        answer: Answer,
        decode: Callable[[list[int]], str],
        prompt: str,
        images: list[Any],
        norm: str,
        backend: str = "auto",
        replay: Replay | None = None,
    ):
        self.tokens: list[str] = answer.tokens
        self.token_ids: list[int] = answer.token_ids
        self.text: str = answer.text
        self.layout: TokenLayout = answer.layout
        self.input_ids: Tensor = answer.input_ids
        self.prompt = prompt
        self.images = images
        self.norm = norm
        self._text = vlm_text
        self._operators = operators
        self._trace = trace
        self._decode = decode
        self._backend = backend
        self._replay = replay
        self._unembedding = vlm_text.unembedding()
        self._head_scores: Tensor | None = None
        self._logits: tuple[range, Base] | None = None
        self._position_scores: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self.verification: list[Verification] = []
        self.boxes_of: Callable[[int, str | None, int], BoxWeights] | None = None  # of a joint model's explanation

    @property
    def num_layers(self) -> int:
        return len(self._text.layers)

    @property
    def num_heads(self) -> int:
        return self._text.num_heads

    @property
    @torch.no_grad()
    def head_scores(self) -> Tensor:
        """Log-probability increase of every head's write, float32 [tokens, layers, heads], on the CPU."""
        if self._head_scores is None:
            width = self._trace.residual.shape[-1]
            step = max(1, _WRITE_ELEMENTS // (self.num_layers * self.num_heads * width))
            parts = [
                self._score_heads(range(start, min(start + step, len(self.tokens))))
                for start in range(0, len(self.tokens), step)
            ]
            self._head_scores = torch.cat(parts).float().cpu()
        return self._head_scores

    def top_heads(self, token: int | str, k: int = 10) -> list[tuple[int, int, float]]:
        """The k heads of largest score, [(layer, head, score)], largest first."""
        if k < 1:
            raise InputError(f"k is at least 1, got {k}")
        scores = self.head_scores[self.token_index(token)].flatten()
        best = scores.topk(min(k, len(scores)))
        return [
            (i // self.num_heads, i % self.num_heads, score)
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    @torch.no_grad()
    def position_scores(self, token: int | str, heads: Heads = 10) -> Tensor:
        """Log-probability increase of each position's write, float32 [heads, positions], on the CPU.

        heads: a number (that many of the best), a list of (layer, head), or "all" (layer by layer).
        positions: all of `input_ids`; those the token cannot see, and those a context dropped, have 0.
        """
        index = self.token_index(token)
        wanted = self._heads(index, heads)
        missing = [head for head in wanted if (index, head) not in self._position_scores]
        if missing:
            scores = self._score_positions(index, missing)
            self._position_scores |= {(index, head): row for head, row in zip(missing, scores.unbind(), strict=True)}
            if missing == wanted:
                return scores.clone()
        return torch.stack([self._position_scores[index, head] for head in wanted])

    @torch.no_grad()
    def attention(self, token: int | str) -> Tensor:
        """Attention of the token's row, float32 [layers, heads, positions], on the CPU; it sums to 1 over the
        positions the row sees, the others have 0."""
        index = self.token_index(token)
        alphas = [self._trace.attention(index, layer) for layer in range(self.num_layers)]
        each = range(self.num_layers)
        layers = [layer for layer in each for _ in range(self.num_heads)]
        return self._trace.spread(torch.cat(alphas), layers, len(self.input_ids)).unflatten(0, (len(each), -1))

    def heatmap(self, token: int | str, method: str = "logprob", heads: Heads = 10, image: int = 0) -> Tensor:
        """A map over a picture's tokens, float32 [rows, cols] (`layout.images[image].grid`).

        method: "logprob", the sum of the position scores of `heads`; or another way to draw a map, to compare with:
            "attention", "rollout", "relevancy", "tam", "gradient-input", "random", "exhaustive" (see the modules of
            `mllm_fast.maps`). All but the first two and "random" run the model again: not of a stream or a context.
            "gradient-alignment" is for explanations by a joint model, see `box_weights`.

        A thumbnail's tokens are spread over the cells they cover. "relevancy" and "gradient-input" hold all layers'
        activations at once, and all weights of a model that is read in from elsewhere.
        """
        where = self._image(image)
        return where.to_grid(self.token_values(token, method, heads, image))

    def token_values(self, token: int | str, method: str = "logprob", heads: Heads = 10, image: int = 0) -> Tensor:
        """What `heatmap` lays on the grid: a number an image token, float32 [n], on the CPU."""
        check_choice("method", method, WITH_DETECTOR)
        return find(method)(self, self.token_index(token), self._image(image), heads).float().cpu()

    def box_weights(self, token: int | str, query: str | None = None, image: int = 0) -> BoxWeights:
        """How far the boxes of a detector agree with a token (gradient alignment, arXiv 2405.14612), for explanations
        by `mllm_fast.joint.JointModel`.

        query: what the detector looks for, "a photo of a WORD" by default, with the token's own word.
        """
        if self.boxes_of is None:
            raise InputError(
                "gradient alignment needs a detector: explain by mllm_fast.joint.JointModel (--joint on the command"
                " line)"
            )
        self._image(image)
        return self.boxes_of(self.token_index(token), query, image)

    @property
    def replay(self) -> Replay:
        """What is needed to run the sequence again.

        Raises:
            InputError: of explanations made by stream, or of a context.
        """
        if self._replay is None:
            raise InputError(
                "explanations made by stream, or of a context, keep too little to run the model again: use VLM.explain"
            )
        return self._replay

    def verify(
        self,
        top: float = 0.05,
        controls: int = 8,
        *,
        tokens: Sequence[int | str] | None = None,
        heads: Heads = 10,
        method: str = DEFAULT,
    ) -> list[Verification]:
        """The causal check of the maps: are the patches that a map calls high those that the word hangs on?

        method, heads: the map that is checked, as in `heatmap`; a verdict is shown beside that map alone.

        The highest `top` of the image's tokens are knocked out (image patches -> query and generated, in all layers)
        and the change of log p(token) is put beside that of the same number of random patches, `controls` times, and
        of the lowest. All run in one batch over the explanation's own keys and values of what comes before the query.

        Returns one `Verification` a token (`tokens`: of these, by index or text; all by default), kept in
        `verification`, which `save` shows.
        """
        from .verify import verify

        check_choice("method", method, WITH_DETECTOR)
        chosen = range(len(self.tokens)) if tokens is None else [self.token_index(token) for token in tokens]
        self.verification = [verify(self, token, top, controls, heads, method) for token in chosen]
        return self.verification

    def verified(self, token: int, method: str = DEFAULT, heads: Heads = 10) -> Verification | None:
        """What the last `verify` found for a token's map of this method (and, of "logprob", these heads); None if it
        was not asked."""
        for one in self.verification:
            if one.token == token and one.method == method and (method != DEFAULT or one.heads == heads):
                return one
        return None

    def project(
        self,
        token: int | str,
        layer: int,
        head: int | None = None,
        position: int | None = None,
        *,
        space: str = "unembedding",
        k: int = 10,
    ) -> list[tuple[str, float]]:
        """The k words that a recorded vector is closest to, [(word, value)], largest first (arXiv 2411.10950).

        The vector: the residual input of `layer` at the token's row (`layer` = `num_layers`: what the last one gives);
        with `head` what this head writes there; with `position` too, what it writes from that position.

        space: "unembedding": of a residual vector the log-probability of each word, through the final norm (the logit
            lens); of a write the change of each word's logit, before any soft cap, under the final row's statistics.
            "embedding": the dot product with each word's input embedding.
        """
        from .logit_lens import project

        return project(self, self.token_index(token), layer, head, position, space, k)

    def forget(self) -> None:
        """Drop the scores that were made, so that the next are made anew."""
        self._head_scores = None
        self._logits = None
        self._position_scores = {}

    def token_index(self, token: int | str) -> int:
        """The index of a token given by index (negative from the end) or by its text."""
        if isinstance(token, str):
            found = [i for i, text in enumerate(self.tokens) if text.strip() == token.strip()]
            if len(found) == 1:
                return found[0]
            listed = ", ".join(f"{i}: {text.strip()!r}" for i, text in enumerate(self.tokens))
            problem = "is not in the answer" if not found else f"stands {len(found)} times; give its index"
            raise InputError(f"the token {token!r} {problem}; the answer's tokens are {listed}")
        count = len(self.tokens)
        if not -count <= token < count:
            raise InputError(f"the token's index is 0 to {count - 1}, got {token}")
        return token % count

    def save(self, path: str | os.PathLike[str], token: int | str | None = None, method: str = "logprob") -> None:
        """Write the explanation: .png (one token's map, or a sheet of all), .html (one page to click
        through), .json or .safetensors (all numbers). The file appears whole or not at all.

        method: of the maps, as in `heatmap`; a page and numbers have those of "logprob" and "attention" as well.
        """
        from .export import save

        check_choice("method", method, WITH_DETECTOR)
        save(self, path, None if token is None else self.token_index(token), method)

    def _image(self, image: int) -> ImageLayout:
        if not self.layout.images:
            raise InputError("the prompt has no picture to lay a map on")
        if not 0 <= image < len(self.layout.images):
            raise InputError(f"image is 0 to {len(self.layout.images) - 1}, got {image}")
        return self.layout.images[image]

    def _heads(self, index: int, heads: Heads) -> list[tuple[int, int]]:
        if heads == "all":
            return [(layer, head) for layer in range(self.num_layers) for head in range(self.num_heads)]
        if isinstance(heads, int) and not isinstance(heads, bool):
            return [(layer, head) for layer, head, _ in self.top_heads(index, heads)]
        if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads:
            raise InputError(f"heads is a number, a list of (layer, head) or 'all', got {heads!r}")
        wanted = [(int(layer), int(head)) for layer, head in heads]  # type: ignore[str-unpack]
        for layer, head in wanted:
            if not (0 <= layer < self.num_layers and 0 <= head < self.num_heads):
                raise InputError(
                    f"head ({layer}, {head}) does not exist: layers are 0 to {self.num_layers - 1},"
                    f" heads 0 to {self.num_heads - 1}"
                )
        return wanted

    def _score_heads(self, tokens: range) -> Tensor:
        """[len(tokens), L, H]: one row a head, so the direct way, all layers and heads in one call."""
        trace, count, layers = self._trace, len(tokens), self.num_layers
        device, wide = trace.residual.device, wide_type(trace.output.dtype)
        writes = torch.empty(layers, self.num_heads, count, trace.residual.shape[-1], dtype=wide, device=device)
        output = trace.output[tokens.start : tokens.stop].to(wide).permute(1, 2, 0, 3)  # [L, H, T, D]
        for some, weight in self._text.projections(device, wide):
            torch.matmul(output[some], weight, out=writes[some])
        base, _ = self._base(tokens)
        scores = logprob_increase(
            base, writes.permute(2, 0, 1, 3).flatten(0, 1), unembedding=self._unembedding, backend=self._backend
        )
        return scores.reshape(count, layers, self.num_heads)

    def _base(self, tokens: range) -> tuple[Base, int]:
        """The logits at every layer's input to some tokens' rows, and which of its vectors is the first of them; made
        once for the calls that follow each other."""
        if self._logits is None or not (self._logits[0].start <= tokens.start and tokens.stop <= self._logits[0].stop):
            trace, layers = self._trace, self.num_layers
            residual = trace.residual[tokens.start : tokens.stop].flatten(0, 1)
            named = [token for token in self.token_ids[tokens.start : tokens.stop] for _ in range(layers)]
            final = trace.final[tokens.start : tokens.stop, None].expand(-1, layers, -1).flatten(0, 1)
            ids = torch.tensor(named, device=residual.device)
            self._logits = tokens, Base(residual, ids, self._unembedding, self.norm, final)
        held, base = self._logits
        return base, (tokens.start - held.start) * self.num_layers

    def _score_positions(self, index: int, heads: list[tuple[int, int]]) -> Tensor:
        """[heads, positions]: many rows a head, so the factored way where it pays."""
        stop = self._trace.rows[index] + 1
        step = max(1, _WRITE_ELEMENTS // (stop * self._text.head_dim))
        base, first = self._base(range(index, index + 1))
        device = self._trace.residual.device
        parts = []
        for start in range(0, len(heads), step):
            part = heads[start : start + step]
            layers = {layer for layer, _ in part}
            states = {layer: weight_state(self._text.outputs[layer].weight) for layer in layers}
            scores = logprob_increase(
                base,
                self._trace.position_values(index, part, self._backend),
                unembedding=self._unembedding,
                projection=[_on(self._text.projection(layer, head), device) for layer, head in part],
                source=torch.tensor([first + layer for layer, _ in part], device=device),
                backend=self._backend,
                operators=self._operators,
                keys=[(layer, head, states[layer]) for layer, head in part],
            )
            parts.append(self._trace.spread(scores, [layer for layer, _ in part], len(self.input_ids)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)
