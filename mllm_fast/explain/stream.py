"""Answers that are generated token by token.

Each token can be explained as soon as it appears, and the knockouts may change between two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..core.notebook import Displayed, table
from ..knockout.attention_share import AttentionShares
from ..knockout.rule import Knockout, as_rules
from ..runtime.answer import Answer, answer_of
from ..runtime.decoding import Pass, Watch, own_state
from ..runtime.detokenizer import Detokenizer
from ..runtime.generation_settings import GenerationSettings
from ..runtime.model_runner import Knockouts, ModelRunner
from ..runtime.static_step import StepScores
from ..runtime.trace import Trace
from .explanation import Explanation
from .registry import Heads


class Step(Displayed):
    """One generated token.

    Attributes:
        token: the token's text. It is empty while a character that spans several tokens is unfinished.
        token_id: the token's id.
        index: the token's place in the answer.
        text: the answer so far, without special tokens.
        log_prob: the token's log-probability, before any sampling settings.
    """

    def __init__(
        self,
        stream: Stream,
        index: int,
        token_id: int,
        token: str,
        text: str,
        log_prob: float,
        recorded: tuple[Callable[[], Trace], Tensor, StepScores | None] | None = None,
    ):
        self.index = index
        self.token_id = token_id
        self.token = token
        self.text = text
        self.log_prob = log_prob
        self._stream = stream
        self._recorded = recorded
        self._explanation: Explanation | None = None

    def __repr__(self) -> str:
        return f"Step({self.index}, {self.token!r}, log_prob={self.log_prob:.3f})"

    def _repr_html_(self) -> str:
        if self._explanation is not None or self._recorded is not None:
            return self.explanation._repr_html_()
        return table([("token", self.token), ("log p", self.log_prob), ("answer so far", self.text)])

    @property
    def explanation(self) -> Explanation:
        """The explanation of this token alone, where its index is 0; computed on first access."""
        if self._explanation is None:
            if self._recorded is None:
                raise InputError("this step was not recorded; call stream(..., explain=True)")
            self._explanation = self._stream.explanation_of(self, *self._recorded)
            self._recorded = None
        return self._explanation

    @property
    def head_scores(self) -> Tensor:
        """Log-probability increase of every head's write, float32 [layers, heads]."""
        return self.explanation.head_scores[0]

    def top_heads(self, k: int = 10) -> list[tuple[int, int, float]]:
        """See `Explanation.top_heads`."""
        return self.explanation.top_heads(0, k)

    def position_scores(self, heads: Heads = 10) -> Tensor:
        """See `Explanation.position_scores`."""
        return self.explanation.position_scores(0, heads)

    def attention(self) -> Tensor:
        """See `Explanation.attention`."""
        return self.explanation.attention(0)

    def heatmap(self, method: str = "logprob", heads: Heads = 10, image: int = 0) -> Tensor:
        """See `Explanation.heatmap`."""
        return self.explanation.heatmap(0, method, heads, image)

    def image(self, method: str = "logprob", heads: int = 10) -> Image.Image:
        """See `Explanation.image`."""
        return self.explanation.image(0, method, heads)

    def plot(self, method: str = "logprob", heads: Heads = 10, image: int = 0, ax: Any = None) -> Any:
        """See `Explanation.plot`."""
        return self.explanation.plot(0, method, heads, image, ax)

    def to_frame(self) -> Any:
        """See `Explanation.to_frame`."""
        return self.explanation.to_frame()


class Stream(Iterator[Step]):
    """An iterator over the steps of one answer; see `VLM.stream`.

    `knockout` may be set between steps. `answer` is the answer so far. To leave a stream early and free its key/value
    cache, use it as a context manager or call `close`.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        vlm: ModelRunner,
        layout: TokenLayout,
        prompt: str,
        images: list[Any],
        explain: bool,
        final_norm: str,
        settings: GenerationSettings,
        knockout: Knockouts = None,
        shares: AttentionShares | None = None,
        over_context: bool = False,
    ):
        self.layout = layout
        self.prompt = prompt
        self.images = images
        self._vlm = vlm
        self._final_norm = final_norm
        self._over_context = over_context
        self.watch = Watch(explain, None, shares)  # what is wanted of the next pass
        self._settings, self._stop_ids = settings, settings.stop_ids
        self._passes: Iterator[Pass | None] | None = None
        self._sequence: Tensor | None = None
        self._state: list[Any] = []
        # entered for the first forward pass, which reads the images
        self.first: AbstractContextManager[Any] = nullcontext()
        self._tokens = Detokenizer(vlm.processor.tokenizer)
        self._plain = Detokenizer(vlm.processor.tokenizer, skip_special_tokens=True)
        self._done = False  # whether the last step ended the answer
        self._text = ""
        self._count = 0
        self._rules: tuple[Knockout, ...] = ()
        self.knockout = knockout  # type: ignore[assignment]

    @property
    def knockout(self) -> tuple[Knockout, ...]:
        """The knockout rules of the next step: set one, several, or None. Cached keys and values do not change."""
        return self._rules

    @knockout.setter
    def knockout(self, rules: Knockouts) -> None:
        if as_rules(rules) and self._over_context:
            raise InputError("a context's answers take no knockouts; use VLM.stream")
        plan = self._vlm.plan(rules, [self.layout])
        self._rules, self.watch.plan = as_rules(rules), plan

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        sequence = torch.empty(0, dtype=torch.long) if self._sequence is None else self._sequence
        limit = self._settings.limit(self.layout.length)
        said = answer_of(sequence, self.layout, self._vlm.processor.tokenizer, self._settings, limit)
        if not self._done:
            said = replace(said, finish_reason=None)
        plan, shares = self.watch.plan, self.watch.shares
        if plan is not None:
            said = replace(said, unreached_layers=plan.unreached(self._vlm.text.findings.others))
        return said if shares is None else replace(said, attention_share=shares.of(0, len(said.token_ids)))

    def begin(self, start: Callable[[], Iterator[Pass | None]]) -> None:
        """Start the stream on the passes of `start`, such as a call of `generate` with `one_sequence`."""
        with own_state(self._vlm, self._state):
            self._passes = start()
            next(self._passes)  # run to the first yield; nothing is computed before a step is requested

    def __next__(self) -> Step:
        if self._passes is None:
            raise StopIteration
        try:
            token_id, log_prob, sequence, done, trace, scores = self._compute()
        except BaseException:
            self.close()
            raise
        self._sequence, self._done = sequence, done
        if done and token_id in self._stop_ids:  # a padding token that is no stop token does not end the answer
            self.close()
            raise StopIteration
        token = self._tokens.push(token_id)
        self._text += self._plain.push(token_id)
        recorded = None if trace is None else (trace, sequence, scores)
        step = Step(self, self._count, token_id, token, self._text.strip(), log_prob, recorded)
        self._count += 1
        return step

    def _compute(self) -> Pass:
        """Run one forward pass."""
        first, self.first = self.first, nullcontext()
        with own_state(self._vlm, self._state), first:
            return next(self._passes)  # type: ignore[arg-type, return-value]

    def close(self) -> None:
        """Free the key/value cache and end the stream."""
        if self._passes is not None:
            self._passes.close()  # type: ignore[attr-defined]
        self._passes = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def explanation_of(
        self, step: Step, trace: Callable[[], Trace], sequence: Tensor, scores: StepScores | None
    ) -> Explanation:
        """Return the explanation of one step's token."""
        length = self.layout.prompt_length + step.index
        layout = replace(self.layout, length=length + 1)
        said = Answer(step.token, [step.token_id], [step.token], layout, sequence[: length + 1].cpu())
        return Explanation.of(
            self._vlm,
            trace(),
            said,
            prompt=self.prompt,
            images=self.images,
            final_norm=self._final_norm,
            knockouts=self._rules,
            known=scores,
        )
