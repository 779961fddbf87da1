"""Explanation: the scores of one answer, and what can be done with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..core.errors import InputError
from ..runtime.answer import Answer
from ..runtime.model_runner import ModelRunner
from ..runtime.trace import Trace
from . import export, logit_lens
from .registry import DEFAULT, HEATMAP_METHODS, Heads
from .replay import Replay
from .scores import Scores
from .verification import Verification
from .verify import verify


def nothing_generated(options: dict[str, Any]) -> None:
    """Raise InputError for options of a generation where the answer is given."""
    if options:
        raise InputError(f"{', '.join(options)} cannot be used with a given answer: nothing is generated")


class Explanation(Scores):
    """Why each token of one answer was said: scores, heatmaps, their causal check, the logit lens, files."""

    @classmethod
    def of(
        cls,
        runner: ModelRunner,
        trace: Trace,
        answer: Answer,
        *,
        prompt: str,
        images: list[Any],
        norm: str,
        replay: Replay | None = None,
    ) -> Explanation:
        """The explanation of an answer that a runner's model gave while it was recorded."""
        return cls(
            text_model=runner.text,
            operators=runner.operators,
            trace=trace,
            answer=answer,
            decode=runner.processor.tokenizer.decode,
            prompt=prompt,
            images=images,
            norm=norm,
            backend=runner.backend,
            replay=replay,
        )

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
        HEATMAP_METHODS.get(method)
        chosen = range(len(self.tokens)) if tokens is None else [self.token_index(token) for token in tokens]
        self.verification = [verify(self, token, top, controls, heads, method) for token in chosen]
        return self.verification

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
        return logit_lens.project(self, self.token_index(token), layer, head, position, space, k)

    def save(self, path: str | os.PathLike[str], token: int | str | None = None, method: str = "logprob") -> None:
        """Write the explanation: .png (one token's map, or a sheet of all), .html (one page to click
        through), .json or .safetensors (all numbers). The file appears whole or not at all.

        method: of the maps, as in `heatmap`; a page and numbers have those of "logprob" and "attention" as well.
        """
        HEATMAP_METHODS.get(method)
        export.save(self, path, None if token is None else self.token_index(token), method)
