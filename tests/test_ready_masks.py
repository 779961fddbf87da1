"""Knockouts on top of every mask that transformers can hand over: ready 4-D ones, and rules that are not causal. One
that closes nothing is the identity, and one that closes something closes just that."""

from __future__ import annotations

import pytest
import torch
from mllm_fast.kernels import segment_table
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_overlay,
)

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.knockout.plan import plan_of
from mllm_fast.runtime.attention import Scoring, attend, attend_dense, seen_by
from mllm_fast.runtime.hooks import recording
from mllm_fast.runtime.row_mask import RowMask, row_mask

KEYS = 23
IMAGE = torch.tensor([0] * 5 + [1] * 9 + [0] * 9)  # tokens that see each other both ways, as Gemma's and PaliGemma's do
LOWEST = torch.finfo(torch.float64).min


def same_image(batch, head, row, key):
    return (IMAGE[row] == 1) & (IMAGE[key] == 1)


def everything(batch, head, row, key):
    return (row >= 0) & (key >= 0)


RULES = {
    "causal": causal_mask_function,
    "sliding": and_masks(sliding_window_overlay(6), causal_mask_function),
    "chunked": and_masks(chunked_overlay(7, torch.zeros(2, dtype=torch.long)), causal_mask_function),
    "image both ways": or_masks(causal_mask_function, same_image),
    "both ways": everything,
}


def ready(kind: str, form: str, rows: int, padding: torch.Tensor | None):
    """The mask of a rule as transformers may give it: as it is, or as an array, bool or added to the scores."""
    mask = row_mask(2, rows, KEYS, KEYS - rows, 0, RULES[kind], padding)
    assert isinstance(mask, RowMask)
    if form == "rule":
        return mask
    seen = mask.block(0, rows)
    return seen if form == "bool" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, LOWEST)


@pytest.fixture
def operands():
    gen = torch.Generator().manual_seed(3)
    draw = lambda heads: torch.randn(2, heads, KEYS, 16, generator=gen, dtype=torch.float64)  # noqa: E731
    return draw(4), draw(2), draw(2)


def with_padding(side: str) -> torch.Tensor | None:
    if side == "none":
        return None
    padding = torch.ones(2, KEYS, dtype=torch.long)
    padding[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return padding


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("rows", [KEYS, 3, 1])
@pytest.mark.parametrize("form", ["rule", "bool", "float"])
@pytest.mark.parametrize("kind", RULES)
def test_a_knockout_that_closes_nothing_is_the_identity(operands, kind, form, rows, side):
    query, key, value = operands
    query = query[:, :, -rows:]
    mask = ready(kind, form, rows, with_padding(side))
    segments = torch.randint(0, 4, (2, KEYS), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    nothing = segments, segment_table([(9, 8), (4, 5)])  # of kinds that no position is of
    for mass in (False, True):
        plain, closed = (attend(query, key, value, mask, Scoring(0.25), c, mass) for c in (None, nothing))
        torch.testing.assert_close(closed.output, plain.output, rtol=0, atol=1e-12)
        if mass:
            torch.testing.assert_close(closed.mass, plain.mass, rtol=0, atol=1e-12)
    for got, wanted in zip(
        *(attend_dense(query, key, value, mask, Scoring(0.25), c) for c in (nothing, None)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [KEYS, 3])
@pytest.mark.parametrize("form", ["rule", "bool", "float"])
@pytest.mark.parametrize("kind", RULES)
def test_a_knockout_closes_what_it_names(operands, kind, form, rows):
    """Against softmax(q k^T) v with the closed pairs taken out by hand; later keys too."""
    query, key, value = operands
    query = query[:, :, -rows:]
    mask = ready(kind, form, rows, None)
    segments = torch.randint(0, 4, (2, KEYS), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    closed = {(1, 0), (2, 3)}
    seen = ready(kind, "bool", rows, None).expand(2, -1, -1, -1).clone()
    for b in range(2):
        for r in range(rows):
            for k in range(KEYS):
                if (int(segments[b, k]), int(segments[b, KEYS - rows + r])) in closed:
                    seen[b, :, r, k] = False
    scores = (query @ key.repeat_interleave(2, 1).mT * 0.25).masked_fill(~seen, -torch.inf)
    wanted = torch.softmax(scores, -1).nan_to_num(0) @ value.repeat_interleave(2, 1)
    got = attend(query, key, value, mask, Scoring(0.25), (segments, segment_table(closed)))
    torch.testing.assert_close(got.output, wanted, rtol=0, atol=1e-12)


def test_a_window_that_begins_later_has_its_own_segments():
    """A sliding window's cache holds the last keys alone: the segments are those of their positions."""
    cut = 8
    mask = row_mask(2, 2, KEYS - cut, KEYS - 2, cut, RULES["sliding"], None)
    whole = row_mask(2, 2, KEYS, KEYS - 2, 0, RULES["sliding"], None)
    segments = torch.randint(0, 4, (2, KEYS), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    table = segment_table([(1, 0), (2, 3), (0, 0)])
    short = seen_by(mask, 0, 2, 2, KEYS - cut, (segments[:, cut:], table))[0]
    assert (short == seen_by(whole, 0, 2, 2, KEYS, (segments, table))[0][..., cut:]).all()


@pytest.mark.parametrize("form", ["bool", "float"])
def test_logits_under_a_mask_of_the_callers_own(built, picture, form):
    """Bidirectional image attention as a ready mask: a knockout that concerns no row of the prompt moves no logit, and
    one that does moves them as the same mask with these pairs closed."""
    vlm = mf.VLM(*built("llava"))
    inputs, (layout,), _ = vlm.prompts.prepare([[picture]], ["what is there"])
    ids = inputs["input_ids"]
    embeds = vlm.model.get_input_embeddings()(ids)
    count = ids.shape[1]
    image, query = layout.positions("image"), layout.positions("query")
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    seen[image[:, None], image[None, :]] = True

    def logits(mask: torch.Tensor, rule=None) -> torch.Tensor:
        given = mask[None, None]
        if form == "float":
            given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, LOWEST)
        plan = plan_of(rule, [layout], len(vlm.text.layers))
        with torch.no_grad(), recording(vlm.text, knockouts=plan):
            found = vlm.text.decoder(inputs_embeds=embeds, attention_mask=given, use_cache=False)
        return vlm.text.logits(found.last_hidden_state)

    plain = logits(seen)
    assert (plain - logits(seen.tril())).abs().max() > 1e-3, "seeing later tokens must matter here"
    torch.testing.assert_close(logits(seen, mf.Knockout("image", "generated")), plain, rtol=0, atol=1e-10)
    without = seen.clone()
    without[query[:, None], image[None, :]] = False
    torch.testing.assert_close(logits(seen, mf.Knockout("image", "query")), logits(without), rtol=0, atol=1e-10)


def test_explanations_of_what_a_mask_adds_are_refused(built, picture):
    vlm = mf.VLM(*built("llava"))
    inputs, _, _ = vlm.prompts.prepare([[picture]], ["what is there"])
    count = inputs["input_ids"].shape[1]
    bias = torch.zeros(1, 1, count, count, dtype=torch.float64).masked_fill(
        ~torch.ones(count, count).bool().tril(), LOWEST
    )
    by_head = torch.ones(1, vlm.text.num_heads, count, count, dtype=torch.bool).tril()
    for mask in (bias + torch.linspace(0, 1, count, dtype=torch.float64), by_head):
        with pytest.raises(InputError, match="pass such a mask to generate only"), recording(vlm.text, rows=1):
            vlm.text.decoder(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False)
    with recording(vlm.text, rows=1):
        vlm.text.decoder(input_ids=inputs["input_ids"], attention_mask=bias, use_cache=False)
