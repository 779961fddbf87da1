"""Find which heads answer a question, and what they carry (arXiv 2411.10950, figures 3 to 5).

The same question is asked about an image and about a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError
from ...explain.logit_lens import word_values, write_of
from ...runtime.detokenizer import token_texts
from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..judges.judge import NounJudge, shapes_judge
from ..registry import evaluation
from ..report import Report
from ..rows import Row
from ..samples import Sample
from .heads_report import report_of
from .text_only_model import load_text_model
from .word_alignment import cells, widened

if TYPE_CHECKING:
    from ...explain.explanation import Explanation
    from ...vlm import VLM

TOP = 10  # the number of best heads, and of best image tokens


@evaluation
class Heads(Evaluation):
    """An evaluation of the heads that answer a visual and a textual question.

    There is one row for each object that has an attribute, and a noun that no other object of the image has. The visual
    question is about the image. The textual question has no image, but a `statement` that contains the answer. The
    first token of the right answer is explained. A row has these fields:

    - "visual", "textual": the log-probability increase of every head, [L][H].
    - "second": the log-probability increase of every head of another, text-only model for the textual question.
    - "right": whether the model itself would say the right token, for each question.
    - "held": the share of the ten best heads' positive increase that comes from the object's tokens (visual), and from
      the answer's word in the statement (textual).
    - "area": the object's share of the image, in tokens after `near` has widened its mask.
    - "writes", "layers", "embedding": how well the right word can be read. The measures are 1 / the word's rank among
      all words, and its logit minus that of another attribute. The word is read from the best heads' writes at their
      best position, from the residual vector at the best image token before each layer, and from that token's input
      embedding among the words' embeddings.
    - "attention": the attention of the ten best heads to the ten best image tokens ("own"), and what is left of it when
      the question names another object ("other").

    Args:
        question: The question, with {noun} for the object.
        statement: The statement of the textual question, with {noun} and {attribute}.
        words: The vocabulary of nouns and attributes. None stands for that of the generated scenes.
        near: The number of tokens by which an object's mask is widened on every side.
        seed: The seed of the choice of another noun and another attribute.
        second_model: The name of a text-only model that gets the textual question, too.
        prefix: The words with which the answer begins before the attribute, with {noun}, as in "The color of the {noun}
            is"; None for no such words.
        chat_template: Whether the questions are asked in the chat template, as in `VLM.generate`.

    Raises:
        InputError: The question or the statement lacks a placeholder, or the vocabulary has fewer than two nouns or
            attributes.
    """

    name: ClassVar[str] = "heads"
    title: ClassVar[str] = "Which heads answer, and what they carry"
    needs_masks: ClassVar[bool] = True

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(
            options.question,
            options.statement,
            options.words,
            second_model=options.second_model,
            prefix=options.prefix,
            chat_template=options.chat_template,
        )

    def __init__(
        self,
        question: str = "what color is the {noun}?",
        statement: str = "the {noun} is {attribute}.",
        words: NounJudge | None = None,
        near: int = 1,
        seed: int = 0,
        second_model: str | None = None,
        prefix: str | None = None,
        chat_template: bool = True,
    ):
        if "{noun}" not in question:
            raise InputError(f"the question names the object as {{noun}}, got {question!r}")
        if "{noun}" not in statement or "{attribute}" not in statement:
            raise InputError(f"the statement has {{noun}} and {{attribute}}, got {statement!r}")
        self.words = words or shapes_judge()
        if len(self.words.attributes) < 2 or len(self.words.nouns) < 2:
            raise InputError("heads need a vocabulary of two nouns and two attributes or more")
        self.settings: dict[str, Any] = {
            "question": question,
            "statement": statement,
            "vocabulary": self.words.settings,
            "near": near,
            "seed": seed,
            "second_model": second_model,
            "prefix": prefix,
            "chat_template": chat_template,
        }
        self._second: VLM | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_second": None}  # each process loads its own

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.things is None:
            raise InputError(f"{sample.name}: no masks are known of its objects")
        named = [self._named(thing.name) for thing in sample.things]
        nouns = [noun for _, noun in named]
        found = []
        for thing, (attribute, noun) in zip(sample.things, named, strict=True):
            if attribute and nouns.count(noun) == 1:
                rng = np.random.default_rng([self.settings["seed"], *thing.name.encode(), *sample.name.encode()])
                others = self.other_nouns(nouns, noun)
                wrong = [other for other in self.words.attributes if other != attribute]
                pick = lambda names, rng=rng: names[int(rng.integers(len(names)))]  # noqa: E731
                found.append(self._row(vlm, sample.image, attribute, noun, pick(others), pick(wrong), thing.mask))
        return found

    def other_nouns(self, nouns: Sequence[str], noun: str) -> list[str]:
        """Return the nouns that stand for another object: those of the image, if it has another."""
        return [other for other in nouns if other and other != noun] or [
            other for other in self.words.nouns if other != noun
        ]

    def _named(self, name: str) -> tuple[str, str]:
        """Return the attribute and the noun of an object's name. Each is "" where the name has none or several."""
        mentions = self.words.mentions(name)
        if len(mentions) != 1:
            return "", ""
        attributes = mentions[0].attributes
        return (attributes[0] if len(attributes) == 1 else ""), mentions[0].thing

    def _row(
        self, vlm: VLM, image: Any, attribute: str, noun: str, other: str, wrong: str, mask: np.ndarray
    ) -> dict[str, Any]:
        statement = self.settings["statement"].format(noun=noun, attribute=attribute)
        visual, elsewhere = (self.asked(vlm, image, "", asked, attribute) for asked in (noun, other))
        textual = self.asked(vlm, None, statement, noun, attribute)
        model = self._second_model(vlm)
        second = None if model is None else self.asked(model, None, statement, noun, attribute)
        picture = visual.layout.images[0]
        hits = widened(cells(mask, picture), self.settings["near"])
        best = [head[:2] for head in visual.top_heads(0, TOP)]
        values = visual.attribution(0, heads=best)
        tokens = picture.positions[values.topk(min(TOP, len(values))).indices]
        against = int(vlm.prompts.answer_ids(wrong)[0])
        stages = visual.replay.layer_inputs(int(tokens[0]))
        looks = [float(attention_of(ex, best, tokens).mean()) for ex in (visual, elsewhere)]
        spread = visual.heatmap(0, heads=best).clamp_min(0)
        rest = visual.position_scores(0, best).sum(0).clamp_min(0).sum() - values.clamp_min(0).sum()
        return {
            "noun": noun,
            "attribute": attribute,
            "visual": visual.head_scores[0].tolist(),
            "textual": textual.head_scores[0].tolist(),
            **({} if second is None else {"second": second.head_scores[0].tolist()}),
            "right": {"visual": _says(visual), "textual": _says(textual)},
            "held": {
                "visual": _share(spread[torch.from_numpy(hits)].sum(), spread.sum() + rest),
                "textual": _at_word(vlm, textual, statement, attribute),
            },
            "area": float(hits.mean()),
            "writes": {"visual": _from_writes(visual, against), "textual": _from_writes(textual, against)},
            "layers": [
                readable(word_values(visual, 0, x, "unembedding"), visual.token_ids[0], against) for x in stages
            ],
            "embedding": readable(word_values(visual, 0, stages[0], "embedding"), visual.token_ids[0], against),
            "attention": {"own": looks[0], "other": looks[1]},
        }

    def _second_model(self, vlm: VLM) -> VLM | None:
        name = self.settings["second_model"]
        if name is not None and self._second is None:
            self._second = load_text_model(name, vlm)
        return self._second

    def asked(self, vlm: VLM, image: Any, statement: str, noun: str, attribute: str) -> Explanation:
        """Explain an attribute as the answer to the question about a noun, which may follow a statement."""
        question, prefix = self.settings["question"].format(noun=noun), self.settings["prefix"]
        return vlm.explain(
            image,
            f"{statement} {question}" if statement else question,
            attribute,
            prefix=None if prefix is None else prefix.format(noun=noun),
            chat_template=self.settings["chat_template"],
        )

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        if not every:
            return self.nothing("No object has an attribute and a noun of its own.")
        return report_of(self.name, self.title, every, len(rows))


def readable(values: Tensor, right: int, wrong: int) -> dict[str, float]:
    """Return how well the right word can be read from values.

    Args:
        values: A value for each word, [V].
        right: The token id of the right word.
        wrong: The token id of the wrong word.

    Returns:
        "reciprocal rank", 1 / the rank of the right word; "logit minus", its value minus that of the wrong word.
    """
    rank = 1 + int((values > values[right]).sum())
    return {"reciprocal rank": 1 / rank, "logit minus": float(values[right] - values[wrong])}


def _says(ex: Explanation) -> bool:
    """Return whether the model itself would have said the explained token."""
    return int(word_values(ex, 0, ex.trace.final[0], "unembedding").argmax()) == ex.token_ids[0]


def _from_writes(ex: Explanation, against: int) -> dict[str, float]:
    """Return how well the right word can be read from what the best heads write at their best positions, on average."""
    heads = [head[:2] for head in ex.top_heads(0, TOP)]
    at = ex.position_scores(0, heads).argmax(1)
    found = []
    for (layer, head), position in zip(heads, at.tolist(), strict=True):
        write = write_of(ex, 0, layer, head, position)
        found.append(readable(word_values(ex, 0, write, "unembedding", write=True), ex.token_ids[0], against))
    return {name: mean_and_error([one[name] for one in found])[0] for name in found[0]}


def attention_of(ex: Explanation, heads: Sequence[tuple[int, int]], tokens: Tensor) -> Tensor:
    """Return the attention of heads to tokens, summed over the tokens, [heads]."""
    alpha = ex.attention(0)
    return torch.stack([alpha[layer, head, tokens].sum() for layer, head in heads])


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None


def _at_word(vlm: VLM, ex: Explanation, statement: str, word: str) -> float | None:
    """Return the increase's share at the tokens of the statement's word, or None if the tokens do not spell it."""
    inside = tokens_of(vlm, ex, statement, word)
    if inside is None:
        return None
    scores = ex.position_scores(0, TOP).sum(0).clamp_min(0)
    return _share(scores[: len(inside)][inside].sum(), scores.sum())


def tokens_of(vlm: VLM, ex: Explanation, statement: str, word: str) -> Tensor | None:
    """Return which tokens of a prompt spell the last mention of a word in a statement, bool [prompt length].

    It is None if the tokens do not spell the statement.
    """
    ids = ex.input_ids[: ex.layout.prompt_length].tolist()
    texts = token_texts(vlm.processor.tokenizer, ids)
    text, ends = "".join(texts), np.cumsum([len(one) for one in texts])
    at = text.find(statement)
    if at < 0:
        return None
    begin = at + statement.rindex(word)
    inside = (ends > begin) & (ends - [len(one) for one in texts] < begin + len(word))
    return torch.from_numpy(inside)
