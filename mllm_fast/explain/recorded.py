"""Explanations of answers that the caller's own code generated with the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import InputError
from ..knockout.rule import Knockout
from ..models.media import clips, shown
from ..models.processing import Images, prompt_layout
from ..runtime.answer import answer_of
from ..runtime.model_runner import ModelRunner
from ..runtime.patched import PatchedCall
from ..runtime.trace import make_trace
from .explanation import Explanation
from .replay import Replay


class Recorded:
    """What `VLM.recording` records of the last call inside its block, to explain the answers of that call."""

    def __init__(self, runner: ModelRunner, rules: tuple[Knockout, ...], final_norm: str, calls: list[PatchedCall]):
        self._runner, self._rules, self._final_norm, self._calls = runner, rules, final_norm, calls

    def explanation(
        self, image: Images | None, sequence: int = 0, *, output: Tensor | None = None, prompt: str | None = None
    ) -> Explanation:
        """Return the explanation of one answer of the last call.

        Args:
            image: the image or images of that prompt, or None for text alone.
            sequence: the index of the prompt in the batch.
            output: prompt and answer of every sequence in the form that `generate` returns, int64 [B, N]. It is needed
                if the caller runs a decoding loop of its own. By default it is what `generate` returned.
            prompt: the question, for captions; by default the text behind the image.

        Raises:
            InputError: nothing was generated inside the block, or not one token per forward pass (beams, assisted
                decoding).
        """
        if not self._calls:
            raise InputError("the model was not called inside the block")
        call, runner = self._calls[-1], self._runner
        sequences = call.sequences if output is None else output
        if sequences is None:
            raise InputError("the model's generate was not called inside the block; give what was generated as output=")
        count = len(call.layouts)
        if len(sequences) != count:
            raise InputError(
                f"{len(sequences)} answers to {count} prompts cannot be told apart: generate one answer a prompt"
            )
        if not 0 <= sequence < count:
            raise InputError(f"sequence is 0 to {count - 1}, got {sequence}")
        if call.cache is None:
            raise InputError("the model ran without a KV cache, which an explanation reads: use_cache=True")
        pictures = runner.prompts.load(image)
        pad, length = call.padding[sequence], call.layouts[sequence].length
        ids = call.input_ids[sequence, pad : pad + length]
        stills_before = sum(
            int(call.input_ids[row, call.padding[row] + int(one.positions[0])]) == runner.prompts.image_tokens.image
            for row, layout in enumerate(call.layouts[:sequence])
            for one in layout.images
        )
        before = stills_before, sequence * len(clips(pictures))  # of a batch, whose prompts have as many videos each
        layout = prompt_layout(runner.prompts, ids, call.inputs, pictures, before)
        tokenizer = runner.processor.tokenizer
        answer = answer_of(sequences[sequence, pad:], layout, tokenizer, runner.settings(None, call.inputs))
        if not answer.token_ids:
            raise InputError("the answer is empty: there is no token to explain")
        trace = make_trace(
            runner.text,
            call.record,
            call.cache,
            len(answer.token_ids),
            length,
            sequence if count > 1 else None,
            padding=pad,
        )
        alone = count == 1 and pad == 0  # a pass over a batch cannot be run again for one of its sequences
        return Explanation.of(
            runner,
            trace,
            answer,
            prompt=_question(layout.positions("query"), ids, tokenizer) if prompt is None else prompt,
            images=shown(pictures, layout),
            final_norm=self._final_norm,
            replay=Replay(runner.text, call.record, answer.layout, self._rules, runner.backend) if alone else None,
        )


def _question(positions: Sequence[int] | Tensor, ids: Tensor, tokenizer: object) -> str:
    """Return the text behind the image."""
    chosen = ids.cpu()[torch.as_tensor(positions)].tolist()
    return tokenizer.decode(chosen, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
