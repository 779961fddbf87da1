"""VLM: a vision-language model with its processor."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from .context.compress import compress
from .context.context import Context
from .core.deprecation import renamed_parameters
from .core.errors import InputError
from .core.images import MAX_PIXELS
from .core.layout import TokenLayout
from .explain.explanation import Explanation, nothing_generated
from .explain.recorded import Recorded
from .explain.replay import Replay
from .explain.scores import check_norm
from .explain.static_scores import StaticScores
from .explain.stream import Stream
from .knockout.attention_share import AttentionShares, types_of
from .knockout.rule import Knockout, as_rules
from .models.adapter import Adapter
from .models.loading import load_pretrained, parse_device, parse_dtype
from .models.media import shown
from .models.processing import Images
from .models.tensor_parallel import join_ranks
from .runtime.answer import Answer, answer_of
from .runtime.decoding import one_sequence, static_sequence
from .runtime.direct_passes import passes
from .runtime.kv_cache import cache_of
from .runtime.model_runner import Knockouts, ModelRunner
from .runtime.patched import patched
from .runtime.static_step import check_static
from .runtime.trace import make_trace

_log = logging.getLogger(__name__)


class VLM(ModelRunner):
    """A vision-language model and its processor, ready to generate and to explain.

    The arguments are those of `ModelRunner`.
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_pixels: int = MAX_PIXELS,
        backend: str = "auto",
        adapter: Adapter | type[Adapter] | None = None,
        progress: bool | None = None,
        tp: int | str | None = None,
        **options: Any,
    ) -> VLM:
        """Load a model and its processor.

        Args:
            name: "shapes" (the embedded model), a folder, or a hub id. A folder of LoRA adapters loads the model that
                it names, and adds them to it.
            device: By default the GPU if there is one, or else the CPU. "auto" spreads the layers over all GPUs, and
                keeps those that do not fit on the CPU and (with `offload_folder`) on the disk, from where they are
                read in layer by layer.
            dtype: By default float32 on the CPU and bfloat16 elsewhere.
            max_pixels, backend, adapter: As in `ModelRunner`.
            progress: Show the progress of the download and of the weights on stderr; by default in a terminal, an
                interactive Python or a notebook.
            tp: Divide the model between the processes that torchrun started: "auto", or their number. Each holds some
                heads and some words, and every process makes the same calls with the same arguments. A process that
                waits 25 seconds for another one inside a call ends with an error.
            options: Further arguments of transformers' `from_pretrained`.

        Raises:
            InputError: The model cannot be loaded, or not be divided between these processes.
        """
        if tp is not None and (device == "auto" or "device_map" in options):
            raise InputError(
                "tp divides every layer between processes, device_map layers between devices: give one of them"
            )
        if device == "auto":
            device, options = None, {"device_map": "auto", **options}
        where = parse_device(device)
        kind = parse_dtype(dtype, where)
        ranks = 0 if tp is None else join_ranks(tp, where)
        model, processor = load_pretrained(
            str(name), where, kind, adapter is not None, progress, ranks if ranks > 1 else 0, **options
        )
        return cls(model, processor, max_pixels=max_pixels, backend=backend, adapter=adapter)

    @overload
    def generate(self, image: Images | None, prompt: str, **options: Any) -> Answer: ...
    @overload
    def generate(self, image: Sequence[Images], prompt: list[str], **options: Any) -> list[Answer]: ...

    def generate(
        self,
        image: Any,
        prompt: str | list[str],
        *,
        knockout: Knockouts = None,
        attention_share: bool | str = False,
        prefix: str | Sequence[int] | None = None,
        chat_template: bool = True,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Answer | list[Answer]:
        """Answer a prompt about one image or several, or a list of prompts in one batch.

        Args:
            image: An image or a video (see `Video`), several of them for one prompt, or None for text alone. For a list
                of prompts it is a list of the same length, with one of these for each prompt.
            prompt: The question, without the image placeholder, or a list of questions, which are answered in one
                batch.
            knockout: One `Knockout` or several, which say which tokens may not attend to which; a text such as
                "image->query@from 4" is parsed as `Knockout.parse` does.
            attention_share: Sum up where the generated tokens attend, see `Answer`: in five segments if True, in the
                three of arXiv 2411.17491 ("image_block", "text", "generated") if "paper". With "moments" each image, or
                moment of a video, is a segment of its own ("image:0"). It needs one answer a prompt.
            prefix: Words (or token ids) with which every answer begins, such as "The color of the dog is". The answer
                is what the model says after them; they count as part of the prompt.
            chat_template: Whether the prompt is the user's turn in the model's chat template. Without it the model
                reads the images and the prompt alone, as in "Q: What is the color of the dog? A:".
            max_new_tokens: The longest answer, in tokens. By default what the caller's or the checkpoint's
                `generation_config` says, or 32.
            options: As in transformers' `generate`, such as `generation_config`, `do_sample`, `num_return_sequences`,
                `stop_strings` or `prompt_lookup_num_tokens`. What is not given is as the checkpoint says.

        Returns:
            An `Answer`, or a list of them for a list of prompts. With `num_return_sequences` above 1 it is a list, in
            the order of `generate`: all answers to the first prompt, then all to the second.

        Raises:
            InputError: An option asks for what an `Answer` does not hold, or cannot be combined with the others.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings = self.settings(max_new_tokens, options)
        settings.check_outputs("generate")
        pictures = self.prompts.pictures(image, prompt)
        inputs, layouts, padding = self.prompts.prepare(pictures, prompts, chat_template)
        inputs, layouts = self.begun(inputs, layouts, prefix)
        plan = self.plan(knockout, layouts, padding)
        if plan is not None:
            settings.check_plain("a knockout")
        shares = None
        if attention_share:
            settings.check_single("attention_share")
            shares = self._shares(layouts, padding, attention_share)
        whole = {} if shares is None else self.whole_cache(options)
        output = self.run(inputs, settings, plan, shares, **whole)
        sequences = output if isinstance(output, Tensor) else output.sequences
        read, written = inputs["input_ids"].shape[1], sequences.shape[1] - inputs["input_ids"].shape[1]
        _log.debug("answered %d prompts: of %d tokens, with at most %d", len(prompts), read, written)
        limit, several = settings.limit(inputs["input_ids"].shape[1]), len(sequences) // len(prompts)
        answers = []
        for row, sequence in enumerate(sequences):
            b = row // several
            said = answer_of(sequence[padding[b] :], layouts[b], self.processor.tokenizer, settings, limit)
            if shares is not None:
                said = replace(said, attention_share=shares.of(b, len(said.token_ids)))
            if plan is not None:
                said = replace(said, unreached_layers=plan.unreached(self.text.findings.others))
            answers.append(said)
        return answers[0] if isinstance(prompt, str) and several == 1 else answers

    def _shares(self, layouts: Sequence[TokenLayout], padding: Sequence[int], what: bool | str) -> AttentionShares:
        types = types_of(layouts, what)
        return AttentionShares(layouts, padding, len(self.text.layers), self.text.site_layers, types, self.text.split)

    @renamed_parameters(norm="final_norm")
    def explain(
        self,
        image: Images | None,
        prompt: str,
        answer: str | Sequence[int] | None = None,
        *,
        final_norm: str = "frozen",
        knockout: Knockouts = None,
        prefix: str | Sequence[int] | None = None,
        chat_template: bool = True,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Explanation:
        """Generate an answer, or force `answer`, and explain every token of it from the same run.

        Args:
            image: An image or a video (see `Video`), several of them, or None for a prompt of text alone.
            prompt: The question, without the image placeholder.
            answer: A text (or its token ids) to explain in place of the model's own answer.
            final_norm: "frozen" or "own", see `mllm_fast.kernels.logprob_increase`.
            knockout: As in `generate`; the explanation is then that of the model with these knockouts.
            prefix: As in `generate`. What follows it is explained.
            chat_template, max_new_tokens, options: As in `generate`, for one sequence and one beam.

        Returns:
            An `Explanation`.
        """
        check_norm(final_norm)
        pictures = self.prompts.load(image)
        inputs, layouts, padding = self.prompts.prepare([pictures], [prompt], chat_template)
        inputs, (layout,) = self.begun(inputs, layouts, prefix)
        plan = self.plan(knockout, [layout], padding)
        settings = self.settings(max_new_tokens, options)
        if answer is None:
            settings.check_single("explain")
            with passes(self.text, 1, plan, backend=self.backend, read=self.model) as record:
                forced = {"use_cache": True, "return_dict_in_generate": True, **self.whole_cache(options)}
                output = self.run(inputs, settings, **forced)
            sequence, cache = output.sequences[0], cache_of(output)
        else:
            nothing_generated(options)
            sequence = torch.cat([inputs["input_ids"][0], self.prompts.answer_ids(answer)])
            self.prompts.check_window(len(sequence), "the prompt and the answer take")
            record, cache = self.run_forced(inputs, sequence, plan)
        said = answer_of(sequence, layout, self.processor.tokenizer, settings, settings.limit(layout.length))
        if answer is not None:
            said = replace(said, finish_reason=None)
        origin = "the model's own" if answer is None else "given"
        _log.info("the explained answer is %s: %d tokens after %d", origin, len(said.token_ids), layout.length)
        if not said.token_ids:
            raise InputError("the answer is empty: there is no token to explain; ask another question")
        if plan is not None:
            said = replace(said, unreached_layers=plan.unreached(self.text.findings.others))
        return Explanation.of(
            self,
            make_trace(self.text, record, cache, len(said.token_ids), layout.prompt_length),
            said,
            prompt=prompt,
            images=shown(pictures, layout),
            final_norm=final_norm,
            replay=Replay(self.text, record, said.layout, as_rules(knockout), self.backend),
        )

    @renamed_parameters(norm="final_norm")
    def stream(  # noqa: PLR0913
        self,
        image: Images | None,
        prompt: str,
        *,
        explain: bool = False,
        final_norm: str = "frozen",
        knockout: Knockouts = None,
        attention_share: bool | str = False,
        prefix: str | Sequence[int] | None = None,
        chat_template: bool = True,
        max_new_tokens: int | None = None,
        static: bool = False,
        **options: Any,
    ) -> Stream:
        """Answer token by token, as an iterator that yields a `Step` for each token when it is generated.

        The model is used only while a step is computed, so other calls may run between two steps. Closing the stream
        early leaves nothing behind. `stream.knockout` may be set between steps.

        Args:
            image, prompt: As in `explain`.
            explain: Record what `heatmap`, `top_heads` and other methods of a step need.
            final_norm, knockout, attention_share, prefix, chat_template, max_new_tokens, options: As in `explain` and
                `generate`, for one sequence and one beam.
            static: Read the tokens after the first over arrays of a fixed size, and score the best ten heads in the
                same step: on a GPU a CUDA graph, replayed for every token. It takes no `attention_share`.

        Raises:
            InputError: An argument is not valid, or `static` does not serve this model or call.
        """
        check_norm(final_norm)
        settings = self.settings(max_new_tokens, options)
        settings.check_single("stream")
        if static:
            check_static(self.text)
            if attention_share:
                raise InputError("static=True takes no attention_share: leave one of them out")
        pictures = self.prompts.load(image)
        inputs, layouts, _ = self.prompts.prepare([pictures], [prompt], chat_template)
        inputs, (layout,) = self.begun(inputs, layouts, prefix)
        stream = Stream(
            vlm=self,
            layout=layout,
            prompt=prompt,
            images=shown(pictures, layout),
            explain=explain,
            final_norm=final_norm,
            knockout=knockout,
            shares=self._shares([layout], [0], attention_share) if attention_share else None,
            settings=settings,
        )
        whole = self.whole_cache(options) if explain or attention_share else {}
        if static:
            score = StaticScores(self.text, final_norm, backend=self.backend) if explain else None
            loop = static_sequence(self, stream.watch, score)
        else:
            loop = one_sequence(self, stream.watch)
        stream.begin(lambda: self.run(inputs, settings, use_cache=True, custom_generate=loop, **whole))
        return stream

    @contextmanager
    def knocked_out(self, *knockouts: Knockout) -> Iterator[None]:
        """Run every call of the model inside the block under these knockouts.

        The calls may come from the caller's own `model.generate`, a pipeline of transformers, an evaluation harness, or
        a loop with its own cache. The segments of each call are read from its input ids. `generate` is given the
        prompt. A direct call of the model is a prompt if its cache is empty, and one generated token a sequence after
        that. Batches with padding, beams and sampling work as in `generate`. Other threads wait for the model. When the
        block ends, also by an exception, the model is restored.

        Example:
            >>> with vlm.knocked_out(Knockout("image", "generated")):
            ...     output = vlm.model.generate(**inputs)

        Args:
            knockouts: One `Knockout` or several.

        Raises:
            InputError: There is no knockout, or one does not fit the model. Inside the block: the input ids of a call
                are not known, or its cache was filled outside the block.
        """
        rules = as_rules(knockouts)
        if not rules:
            raise InputError("give at least one Knockout(source, target, layers)")
        with patched(self, rules):
            yield

    @renamed_parameters(norm="final_norm")
    @contextmanager
    def recording(self, *knockouts: Knockout, final_norm: str = "frozen") -> Iterator[Recorded]:
        """Record what the caller's own calls of the model generate inside the block, so that it can be explained.

        Example:
            >>> with vlm.recording() as recorded:
            ...     output = vlm.model.generate(**inputs)
            >>> recorded.explanation(image).save("why.html")

        Args:
            knockouts: As in `knocked_out`; none by default.
            final_norm: "frozen" or "own", see `explain`.

        Yields:
            A `Recorded`, which explains the last call of the block, inside the block or afterwards.
        """
        check_norm(final_norm)
        rules = as_rules(knockouts)
        with patched(self, rules, rows=1) as calls:
            yield Recorded(self, rules, final_norm, calls)

    def compress(
        self,
        image: Images,
        keep: float | int | str = 0.05,
        prompt: str = "Describe the image.",
        score: str = "generated",
        *,
        parts: str = "query+image",
        seed: int = 0,
        budget: str = "all",
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Context:
        """Read an image once and keep, in each layer, only the tokens that matter most (arXiv 2411.17491).

        Args:
            image: An image or a video, or several.
            keep: The share of the image tokens (0.05 or "5%"), or how many of them (29), that each
                layer keeps.
            prompt: The first question to the model. Its tokens, which have seen the image, are kept.
            score: How image tokens are chosen. "generated": by the attention of the model's answer to the prompt.
                "query": by the attention of the prompt itself, which needs no answer. "key_norm": by small keys (arXiv
                2406.11430). "random": at random. Or the name of a score that `pruning_score` added.
            parts: Which parts are kept: "query+image"; "query", no image token; "image", no token of the prompt. The
                tokens before the image are always kept.
            seed: The seed for "random".
            budget: What `keep` is a share of, or a count in: "all" image tokens together, or those of each "frame", so
                that no moment of a video (and none of several images) is lost.
            max_new_tokens, options: For the answer to the prompt, as in `generate`. It is greedy unless they say
                otherwise, whatever the checkpoint says, so that what is kept is no matter of chance.

        Returns:
            A `Context`.
        """
        return compress(self, image, keep, prompt, score, parts, seed, max_new_tokens, budget, **options)
