"""Probabilities of given answers, and numeric answers as an expectation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from .hooks import model_lock
from .model_runner import ModelRunner

YES_NO = {"yes": ("yes", "Yes"), "no": ("no", "No")}
ONE_TO_TEN = {str(number): float(number) for number in range(1, 11)}


def yes_probabilities(runner: ModelRunner, pictures: Sequence[list[Any]], prompts: Sequence[str]) -> Tensor:
    """Return P(yes) / (P(yes) + P(no)) by the first token of the answer to each prompt, computed in one batch.

    Args:
        runner: The model.
        pictures: The PIL images of each prompt.
        prompts: The prompts.

    Returns:
        float64 [prompts], on the CPU.

    Raises:
        InputError: Yes and no begin with the same token in this model's vocabulary.
    """
    inputs, _, _ = runner.prompts.prepare([list(one) for one in pictures], list(prompts))
    output = runner.run(inputs, runner.settings(1), output_logits=True, return_dict_in_generate=True)
    logits = output.logits[0].double()
    ids = {name: {int(runner.prompts.answer_ids(word)[0]) for word in words} for name, words in YES_NO.items()}
    neither = ids["yes"] & ids["no"]  # such as the unknown token
    if neither in (ids["yes"], ids["no"]):
        raise InputError("this model's vocabulary does not tell yes from no by their first token")
    yes, no = (logits[:, sorted(ids[name] - neither)].logsumexp(-1) for name in ("yes", "no"))
    return torch.sigmoid(yes - no).cpu()


def answer_probabilities(runner: ModelRunner, pictures: list[Any], prompt: str, answers: Sequence[str]) -> Tensor:
    """Return the probability that the answer begins with each of the given texts, float64 [answers].

    The probability of "1" excludes that of "10" if both are given.

    Raises:
        InputError: Fewer than two different answers are given, or two of them have the same tokens.
    """
    if len(set(answers)) < 2:
        raise InputError(f"give at least two different answers, got {list(answers)}")
    ids = [runner.prompts.answer_ids(answer).tolist() for answer in answers]
    if len({tuple(one) for one in ids}) < len(ids):
        raise InputError("two of the answers are the same to this model's tokenizer; give others")
    inputs, _, _ = runner.prompts.prepare([pictures], [prompt])
    first: Tensor | None = None
    found = []
    for one in ids:
        if len(one) == 1 and first is not None:
            log_probs = first
        else:
            log_probs = _log_probs(runner, inputs, one)
            first = log_probs[:1]
        steps = log_probs[torch.arange(len(one)), torch.tensor(one, device=log_probs.device)]
        found.append(steps.sum().exp().cpu())
    whole = torch.stack(found)
    longer = [[j for j, other in enumerate(ids) if len(other) > len(one) and other[: len(one)] == one] for one in ids]
    # an answer that continues others is subtracted once, from the longest of them
    direct = [[j for j in later if not any(j in longer[k] for k in later)] for later in longer]
    return torch.stack([(whole[i] - whole[later].sum()).clamp_min(0) for i, later in enumerate(direct)])


def expectation(
    runner: ModelRunner, pictures: list[Any], prompt: str, values: Mapping[str, float] = ONE_TO_TEN
) -> float:
    """Return a numeric answer as its expectation over the possible answers.

    The expectation is finer than the answer itself: a score from 1 to 10 seldom moves by a whole digit.

    Args:
        runner: The model.
        pictures: The PIL images of the prompt.
        prompt: The prompt, which asks for a number.
        values: The possible answers and the number that each stands for.

    Raises:
        InputError: The model gives none of the answers any probability.
    """
    probabilities = answer_probabilities(runner, pictures, prompt, list(values))
    total = float(probabilities.sum())
    if not total > 0:
        raise InputError(f"the model gives none of {', '.join(values)} a chance; ask in another way")
    return float(probabilities @ torch.tensor(list(values.values()), dtype=torch.float64)) / total


def _log_probs(runner: ModelRunner, inputs: Any, ids: list[int]) -> Tensor:
    """Return log p of every token at each step of an answer, float64 [len(ids), V]."""
    sequence = torch.cat([inputs["input_ids"], inputs["input_ids"].new_tensor([ids[:-1]])], 1)
    runner.prompts.check_window(sequence.shape[1], "the prompt and the answer take")
    extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in extra:
        kinds = extra["mm_token_type_ids"]
        extra["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(ids) - 1))
    with model_lock(runner.text), runner.text.inference():
        output = runner.model(
            input_ids=sequence,
            attention_mask=torch.ones_like(sequence),
            use_cache=False,
            logits_to_keep=len(ids),
            **extra,
        )
    return output.logits[0].double().log_softmax(-1)
