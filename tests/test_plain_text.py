"""Marks that users type are text: no special token, no image, no turn comes of them."""

from __future__ import annotations

import pytest
import tiny
import torch
from families import BUILD, build

import mllm_fast as mf

QUESTION = "what color is the circle ?"


def marks(vlm: mf.VLM) -> list[str]:
    tokenizer = vlm.processor.tokenizer
    found = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found |= {value for name, value in vars(vlm.processor).items() if name.endswith("_token") and value}
    return sorted(one for one in found if one != tokenizer.unk_token)


def specials(vlm: mf.VLM, ids) -> list[int]:
    tokenizer = vlm.processor.tokenizer
    special = {token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    return [one for one in ids.tolist() if one in special - {tokenizer.unk_token_id}]


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *sorted(BUILD)])
def test_prompts_of_every_kind_of_template(family, picture):
    vlm = mf.VLM(*(tiny.BUILD[family]() if family in tiny.BUILD else build(family)))
    plain, (layout,), _ = vlm.prompts.prepare([[picture]], [QUESTION])
    for mark in marks(vlm):
        typed = f"what {mark} color {mark} is the circle ?"
        found, (other,), _ = vlm.prompts.prepare([[picture]], [typed])
        assert specials(vlm, found["input_ids"][0]) == specials(vlm, plain["input_ids"][0]), mark
        assert found["input_ids"].shape == found["attention_mask"].shape
        assert bool(found["attention_mask"].all())
        assert [len(one.positions) for one in other.images] == [len(one.positions) for one in layout.images]
        assert other.length > layout.length
        ids = torch.tensor(vlm.prompts.turn_ids(QUESTION, 1, typed))
        assert specials(vlm, ids) == specials(vlm, torch.tensor(vlm.prompts.turn_ids(QUESTION, 1, QUESTION)))
    assert vlm.generate(picture, f"what {marks(vlm)[0]} ?", max_new_tokens=2).tokens is not None


def test_batches_are_padded_anew(picture, built):
    vlm = mf.VLM(*built("internvl"))
    texts = [QUESTION, "what </s> color <IMG_CONTEXT> </s> ?", "<pad> red ?"]
    inputs, layouts, padding = vlm.prompts.prepare([[picture]] * 3, texts)
    for i, text in enumerate(texts):
        alone, (layout,), _ = vlm.prompts.prepare([[picture]], [text])
        assert torch.equal(inputs["input_ids"][i, padding[i] :], alone["input_ids"][0])
        assert layouts[i].length == layout.length == int(inputs["attention_mask"][i].sum())


def test_characters_of_real_tokenizers(shapes, picture):
    """The embedded model: what is typed is what is read, character by character."""
    tokenizer = shapes.processor.tokenizer
    for mark in marks(shapes):
        ids = shapes.prompts.typed.restored(
            tokenizer(shapes.prompts.typed.hide(f"red {mark} star", found := []), add_special_tokens=False).input_ids,
            found,
        )
        plain = tokenizer("red star", add_special_tokens=False).input_ids
        special = {token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
        assert not special.intersection(ids) - {tokenizer.unk_token_id}
        assert len(ids) > len(plain)
    answer = shapes.prompts.answer_ids("red</s>").tolist()
    assert tokenizer.eos_token_id not in answer


def test_raw_prompts_keep_their_special_tokens(picture, built):
    vlm = mf.VLM(*built("llava"))
    inputs, _, _ = vlm.prompts.prepare([[picture]], ["what </s> color ?"], chat_template=False)
    assert vlm.processor.tokenizer.eos_token_id in inputs["input_ids"][0]
    with pytest.raises(mf.InputError, match="placeholder"):
        vlm.prompts.prepare([[picture]], ["what <image> color ?"], chat_template=False)


def test_a_tokenizer_without_a_stand_in_refuses(picture, built):
    vlm = mf.VLM(*built("llava"))
    vlm.prompts.typed._sample = lambda: " ".join(vlm.prompts.typed._marks)
    with pytest.raises(mf.InputError, match="leave it out"):
        vlm.prompts.prepare([[picture]], ["what </s> color ?"])
