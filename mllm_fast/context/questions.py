"""Questions over a context: their token ids, forward passes and answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.layout import TokenLayout
from ..models.media import parts_of_layout
from ..models.offload import device_of
from ..runtime.answer import Answer, answer_of
from ..runtime.decoding import StepOutput, decode_loop, own_state
from ..runtime.generation_settings import GenerationSettings
from ..runtime.model_runner import ModelRunner
from ..runtime.record import Recording
from ..runtime.recurrent import RecurrentPrefixDecoder, State
from ..runtime.shared_prefix import SharedPrefixDecoder
from ..runtime.trace import Trace


@dataclass(frozen=True)
class Questions:
    """Asks a model questions over a prefix.

    The fields are those of a `Context`, except that `runner` is its model, `prefix` its layout, and `keys` and `values`
    are views [Hkv, M, D], one for each layer with attention.
    """

    runner: ModelRunner
    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor
    input_ids: Tensor
    position: int
    prompt: str
    prefix: TokenLayout
    state: State | None = None

    def trace(self, session: SharedPrefixDecoder, record: Recording, num_tokens: int, length: int) -> Trace:
        """Return the trace that explains tokens of the one question in progress.

        `length` is the number of tokens of the whole sequence that were read so far.
        """
        own = torch.arange(len(self.input_ids), length).expand(len(self.positions), -1)
        return session.trace(record, num_tokens, own.shape[1], torch.cat([self.positions, own], 1))

    def answers(self, ids: list[list[int]], settings: GenerationSettings) -> list[Answer]:
        """Return the answers to questions with these token ids, computed in one batch."""
        prompts = [torch.cat([self.input_ids, torch.tensor(one)]) for one in ids]
        limits = [settings.limit(len(prompt)) for prompt in prompts]
        session = self.decoder(len(ids), max(limits) - 1)
        longest = max(map(len, prompts))
        sequences, ends = torch.empty(0), [0] * len(ids)
        with self.running(), session.recording():
            for said in self.generate(session, ids, prompts, settings, max(limits)):
                if said is not None:
                    sequences = said[2]
                    length = sequences.shape[1]
                    ends = [end or (0 if more else length) for end, more in zip(ends, said[3].tolist(), strict=True)]
        return [
            answer_of(
                # with `max_length` each answer has a limit of its own
                one[longest - len(prompt) : min(end, longest + limit)],
                self.layout(len(prompt)),
                self.runner.processor.tokenizer,
                settings,
                limit,
            )
            for one, prompt, end, limit in zip(sequences.cpu(), prompts, ends, limits, strict=True)
        ]

    def generate(
        self,
        session: SharedPrefixDecoder,
        ids: list[list[int]],
        prompts: list[Tensor],
        settings: GenerationSettings,
        limit: int,
    ) -> Iterator[StepOutput | None]:
        """Run the forward passes that answer some questions with at most `limit` tokens.

        `prompts` are the whole sequences (prefix and question), for the logits processors.
        """
        settings.check_single("a context's answer")
        rows = [prompt.flip(0) for prompt in prompts]
        # pad with a token that every sequence contains: some processors look at which tokens occur
        padding = int(self.input_ids[0])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).flip(1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).flip(1)
        device = device_of(self.runner.model)
        inputs = {"input_ids": padded.to(device), "attention_mask": mask.to(device)}
        return self.runner.run(
            inputs, settings, max_new_tokens=limit, use_cache=True, custom_generate=decode_loop(session, ids)
        )

    def running(self) -> AbstractContextManager[None]:
        """Return a context manager that locks the model and restores its state afterwards."""
        return own_state(self.runner, [])

    def decoder(self, count: int, expected: int = 32) -> SharedPrefixDecoder:
        """Return a decoder for `count` questions at once."""
        text, backend, places = self.runner.text, self.runner.backend, (self.positions, len(self.input_ids))
        if self.state is not None:
            return RecurrentPrefixDecoder(
                self.state, text, self.keys, self.values, self.position, count, backend, places
            )
        return SharedPrefixDecoder(text, self.keys, self.values, self.position, count, backend, expected, places)

    def layout(self, length: int) -> TokenLayout:
        """Return the layout of a sequence of the prefix and a question, `length` tokens in all."""
        return replace(self.prefix, length=length, prompt_length=length)

    def ids(self, question: str, settings: GenerationSettings) -> list[int]:
        """Return the token ids of a question that follows the first turn.

        Raises:
            InputError: the question is empty, or it and the longest answer do not fit the model's window.
        """
        ids = self.runner.prompts.turn_ids(self.prompt, parts_of_layout(self.prefix), question)
        self.check_window(len(ids) + settings.limit(len(self.input_ids) + len(ids)))
        return ids

    def check_window(self, more: int) -> None:
        """Raise InputError if `more` tokens after the prefix do not fit the model's window."""
        self.runner.prompts.check_window(
            self.position + more, "the context's prefix, the question and the longest answer take"
        )
