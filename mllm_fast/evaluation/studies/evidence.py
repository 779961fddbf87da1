"""Measure the evidence of arXiv 2411.10950, sections 3.2 and 3.3 (figures 3 and 4), as the paper defines it.

The same question is asked about a sentence and about an image. What the best heads write and read is projected into the
words of the unembedding, and of the embedding, space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError
from ...explain.logit_lens import word_values, write_of
from ..base import mean_and_error
from ..registry import evaluation
from ..report import Report, Table, cell
from ..rows import Row
from .heads import TOP, Heads, attention_of, readable, tokens_of

if TYPE_CHECKING:
    from ...explain.explanation import Explanation
    from ...vlm import VLM

POSITIONS = 20  # the best image tokens of each head
Measures = dict[str, float]


@evaluation
class Evidence(Heads):
    """An evaluation of where the answer to a question about an object comes from.

    There is one row for each object that has an attribute, and a noun that no other object of the image has. The first
    token of the attribute is explained. The texts are S0, a statement and a question about the noun; S1, which states
    the attribute of another noun; and S2, which asks about another noun. The other noun is not in the image, if the
    vocabulary has such a noun. The best heads are the ten with the largest increase, of S0 and of the visual question.

    All logits are under the statistics of the final row. A mean is taken over the heads (and positions) of an object
    first, then over objects.
    """

    name: ClassVar[str] = "evidence"
    title: ClassVar[str] = "Where the answer comes from"
    needs_masks: ClassVar[bool] = True

    def other_nouns(self, nouns: Sequence[str], noun: str) -> list[str]:
        """Return the nouns that stand for another object: none of the image's, if the vocabulary has others."""
        absent = [other for other in self.words.nouns if other not in nouns]
        return absent or [other for other in self.words.nouns if other != noun]

    def _row(
        self, vlm: VLM, image: Any, attribute: str, noun: str, other: str, wrong: str, mask: np.ndarray
    ) -> dict[str, Any]:
        words = {"noun": noun, "other noun": other, "attribute": attribute, "other attribute": wrong}
        second = self._second_model(vlm)
        return {
            **words,
            "text": self._of_text(vlm, words),
            **({} if second is None else {"second": self._of_text(second, words)}),
            "image": self._of_image(vlm, image, words),
        }

    def _of_text(self, vlm: VLM, words: dict[str, str]) -> Measures:
        """Return the evidence a to d of section 3.2."""
        noun, other, attribute = words["noun"], words["other noun"], words["attribute"]
        texts = [(noun, noun), (other, noun), (noun, other)]
        found = [self._told(vlm, stated, asked, attribute) for stated, asked in texts]
        (s0, inside), (s1, inside_1), _ = found
        heads = [head[:2] for head in s0.top_heads(0, TOP)]
        layers = [layer for layer, _ in heads]
        at = int(inside.nonzero()[-1])
        scores = s0.position_scores(0, heads)[:, : len(inside)]
        ids = {name: int(vlm.prompts.answer_ids(word)[0]) for name, word in words.items()}
        writes = [write_of(s0, 0, *head, at) for head in heads]
        read = [ex.replay.layer_inputs(int(where.nonzero()[-1])) for ex, where in ((s0, inside), (s1, inside_1))]
        colour = _ranked(s0, writes, ids["attribute"], ids["other attribute"])
        known = [
            _ranked(ex, [vectors[layer] for layer in layers], ids["noun"], ids["other noun"])
            for ex, vectors in zip((s0, s1), read, strict=True)
        ]
        looks = [float(attention_of(ex, heads, where.nonzero()[-1:, 0]).mean()) for ex, where in found]
        return {
            "a: share of the increase at the attribute": float(scores[:, inside].sum() / scores.sum()),
            "b: 1/rank of the attribute in writes": colour[0],
            "b: 1/rank of another attribute": colour[1],
            "b: logit difference": colour[2],
            "c: 1/rank of the noun at the attribute, S0": known[0][0],
            "c: 1/rank of another noun, S0": known[0][1],
            "c: logit difference, S0": known[0][2],
            "c: 1/rank of the stated noun, S1": known[1][1],
            "c: 1/rank of the asked noun, S1": known[1][0],
            "c: logit difference, S1": -known[1][2],
            "d: attention at the attribute, S0": looks[0],
            "d: attention at the attribute, S1": looks[1],
            "d: attention at the attribute, S2": looks[2],
        }

    def _told(self, vlm: VLM, stated: str, asked: str, attribute: str) -> tuple[Explanation, Tensor]:
        """Return the explanation of a text, and where the attribute stands in it, bool [prompt length]."""
        statement = self.settings["statement"].format(noun=stated, attribute=attribute)
        ex = self.asked(vlm, None, statement, asked, attribute)
        inside = tokens_of(vlm, ex, statement, attribute)
        if inside is None:
            raise InputError(f"the tokens of the prompt do not spell {statement!r}")
        return ex, inside

    def _of_image(self, vlm: VLM, image: Any, words: dict[str, str]) -> Measures:
        """Return the evidence b to e of section 3.3; a is the figure "held" of the evaluation "heads"."""
        noun, other, attribute = words["noun"], words["other noun"], words["attribute"]
        ex, elsewhere = (self.asked(vlm, image, "", asked, attribute) for asked in (noun, other))
        heads = [head[:2] for head in ex.top_heads(0, TOP)]
        tokens = ex.layout.images[0].positions
        count = min(POSITIONS, len(tokens))
        best = tokens[ex.position_scores(0, heads)[:, tokens].topk(count).indices]  # [heads, positions]
        ids = {name: int(vlm.prompts.answer_ids(word)[0]) for name, word in words.items()}
        writes = [write_of(ex, 0, *head, at) for head, row in zip(heads, best.tolist(), strict=True) for at in row]
        colour = _ranked(ex, writes, ids["attribute"], ids["other attribute"])
        places = best.unique()
        inputs = dict(zip(places.tolist(), ex.replay.layer_inputs(places), strict=True))  # each [L + 1, d]
        read = [inputs[at][layer] for (layer, _), row in zip(heads, best.tolist(), strict=True) for at in row]
        known = _ranked(ex, read, ids["noun"], ids["other noun"])
        embedded = [inputs[at][0] for row in best.tolist() for at in row]
        rest = tokens[~torch.isin(tokens, places)]
        rng = np.random.default_rng([self.settings["seed"], *words["noun"].encode()])
        chance = int((rest if len(rest) else tokens)[int(rng.integers(max(1, len(rest))))])
        away = [ex.replay.layer_inputs(chance)[0]]
        looks = [
            float(torch.stack([attention_of(one, [h], at).sum() for h, at in zip(heads, best, strict=True)]).mean())
            for one in (ex, elsewhere)
        ]
        near = {name: _ranked(ex, embedded, ids[name], ids[f"other {name}"], "embedding") for name in _PAIRS}
        far = {name: _ranked(ex, away, ids[name], ids[f"other {name}"], "embedding") for name in _PAIRS}
        return {
            "b: 1/rank of the attribute in writes": colour[0],
            "b: 1/rank of another attribute": colour[1],
            "b: logit difference": colour[2],
            "c: 1/rank of the noun in layer inputs": known[0],
            "c: 1/rank of another noun": known[1],
            "c: logit difference": known[2],
            "d: attention to the best image tokens": looks[0],
            "d: the same when another noun is asked": looks[1],
            "e: 1/rank of the attribute in visual embeddings": near["attribute"][0],
            "e: 1/rank of another attribute": near["attribute"][1],
            "e: 1/rank of the attribute at a random token": far["attribute"][0],
            "e: 1/rank of the noun in visual embeddings": near["noun"][0],
            "e: 1/rank of another noun": near["noun"][1],
            "e: 1/rank of the noun at a random token": far["noun"][0],
        }

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        if not every:
            return self.nothing("No object has an attribute and a noun of its own.")
        columns = {"text": "the model", "second": "the second model", "image": "the model"}
        there = [kind for kind in columns if kind in every[0]]
        found = {
            kind: {name: mean_and_error([row[kind][name] for row in every]) for name in every[0][kind]}
            for kind in there
        }
        texts = [kind for kind in there if kind != "image"]
        tables = [
            Table(
                "The question about a sentence, mean ± standard error over objects",
                ["evidence", *(columns[kind] for kind in texts)],
                [[name, *(cell(found[kind][name], 3) for kind in texts)] for name in found["text"]],
                "Figure 3. S1 states the attribute of another noun, S2 asks about another noun.",
            ),
            Table(
                "The question about an image, mean ± standard error over objects",
                ["evidence", columns["image"]],
                [[name, cell(value, 3)] for name, value in found["image"].items()],
                f"Figure 4, at the {POSITIONS} best image tokens of each of the {TOP} best heads.",
            ),
        ]
        told, seen = found["text"], found["image"]
        share, read = told["a: share of the increase at the attribute"], "b: 1/rank of the attribute in writes"
        says = [
            f"{len(every)} objects of {len(rows)} images. Of a sentence's question {share[0]:.1%} of the best heads'"
            f" increase comes from the attribute, whose rank in what they write from there is {_rank(told[read])} on"
            f" average (1 / the mean of 1/rank); of an image's question it is {_rank(seen[read])}.",
        ]
        return Report(self.name, self.title, says, tables, [], {"objects": len(every), **found})


_PAIRS = ("attribute", "noun")


def _ranked(
    ex: Explanation, vectors: Sequence[Tensor], right: int, wrong: int, space: str = "unembedding"
) -> tuple[float, float, float]:
    """Return the mean of 1 / rank of two words over vectors, and of the difference of their values."""
    found = []
    for vector in vectors:
        values = word_values(ex, 0, vector, space, norm="frozen")
        first, second = readable(values, right, wrong), readable(values, wrong, right)
        found.append((first["reciprocal rank"], second["reciprocal rank"], first["logit minus"]))
    right_rank, wrong_rank, gap = np.mean(found, 0)
    return float(right_rank), float(wrong_rank), float(gap)


def _rank(value: tuple[float, float]) -> str:
    return f"{1 / value[0]:.2f}" if value[0] else "-"
