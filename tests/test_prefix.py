"""Answers that begin with given words: the model goes on from them, and what follows is explained."""

from __future__ import annotations

import knocked
import pytest
import tiny
import torch

import mllm_fast as mf
from mllm_fast.models.processing import image_text

QUESTION, PREFIX = "what color is the circle ?", "the circle is red and"
IMAGE = {
    "llava": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "qwen2_5_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
}


def test_an_answer_goes_on_from_its_prefix(vlm, picture):
    """As the model itself does whose input ends with the words, prompt by prompt and in a batch."""
    ids = vlm.prompts.answer_ids(PREFIX)
    inputs, _ = vlm.prepare(picture, QUESTION)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids[None]], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, len(ids)))
    with torch.no_grad(), tiny.eager(vlm.model):
        wanted = vlm.model.generate(**whole, max_new_tokens=4, do_sample=False)[0]
    said = vlm.generate(picture, QUESTION, prefix=PREFIX, max_new_tokens=4)
    assert said.input_ids.tolist() == wanted[: len(said.input_ids)].tolist()
    assert said.token_ids == wanted[whole["input_ids"].shape[1] :][: len(said.token_ids)].tolist()
    assert said.layout.prompt_length == whole["input_ids"].shape[1]
    assert set(range(whole["input_ids"].shape[1] - len(ids), whole["input_ids"].shape[1])) <= set(
        said.layout.positions("query").tolist()
    )
    batch = vlm.generate(
        [picture, None][:1] * 2, [QUESTION, "is the big circle red ?"], prefix=PREFIX, max_new_tokens=4
    )
    assert batch[0].token_ids == said.token_ids
    streamed = [step.token_id for step in vlm.stream(picture, QUESTION, prefix=PREFIX, max_new_tokens=4)]
    assert streamed[: len(said.token_ids)] == said.token_ids


def test_what_follows_is_explained(vlm, picture):
    """Its scores are those of the same words inside a given answer."""
    ex = vlm.explain(picture, QUESTION, "blue green", prefix=PREFIX)
    given = vlm.explain(picture, QUESTION, f"{PREFIX} blue green")
    begin = len(given.tokens) - len(ex.tokens)
    assert given.token_ids[begin:] == ex.token_ids
    torch.testing.assert_close(ex.head_scores, given.head_scores[begin:], rtol=1e-5, atol=1e-6)
    own = vlm.explain(picture, QUESTION, prefix=PREFIX, max_new_tokens=2)
    assert own.token_ids == vlm.generate(picture, QUESTION, prefix=PREFIX, max_new_tokens=2).token_ids
    checked = own.verify(tokens=[0], controls=2)[0]
    inputs = knocked.whole(vlm, own.images, QUESTION, [*vlm.prompts.answer_ids(PREFIX).tolist(), own.token_ids[0]])
    with torch.no_grad(), tiny.eager(vlm.model):
        logits = vlm.model(**inputs).logits[0, -2]
    assert checked.log_prob == pytest.approx(float(torch.log_softmax(logits.double(), -1)[own.token_ids[0]]), abs=1e-6)


def test_an_empty_prefix_is_refused(vlm, picture):
    with pytest.raises(mf.InputError, match="is empty"):
        vlm.generate(picture, QUESTION, prefix="  ")


def test_a_raw_prompt_is_all_that_the_model_reads(vlm, family, picture):
    """As if the processor were given the image's placeholder and the prompt, and nothing else."""
    raw = "Q: what color is the star ? A:"
    said = vlm.generate(picture, raw, chat_template=False, max_new_tokens=4)
    inputs = vlm.processor(images=picture, text=f"{IMAGE[family]} {raw}", return_tensors="pt")
    wanted = inputs["input_ids"][0].tolist()
    assert said.input_ids[: said.layout.prompt_length].tolist() == wanted
    assert len(wanted) < vlm.prepare(picture, raw)[0]["input_ids"].shape[1]
    batch = vlm.generate([picture] * 2, [raw, "Q: A:"], chat_template=False, max_new_tokens=4)
    assert batch[0].token_ids == said.token_ids
    ex = vlm.explain(picture, raw, chat_template=False, max_new_tokens=4)
    assert ex.token_ids == said.token_ids
    streamed = [s.token_id for s in vlm.stream(picture, raw, chat_template=False, max_new_tokens=4)]
    assert streamed == said.token_ids
    alone = vlm.generate(None, raw, chat_template=False, max_new_tokens=1)
    plain = vlm.processor.tokenizer(raw).input_ids
    assert alone.input_ids[: len(plain)].tolist() == plain


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("<s>USER: {i}\n{t} ASSISTANT:", "<i>\n"),
        ("<s>{i}USER: {t} ASSISTANT:", "<i>"),
        ("[INST]{i}[/I]{t}[/INST]", "<i>[/I]"),
    ],
)
def test_the_text_that_stands_for_an_image(shapes, template, place):
    """Wherever the template puts it, and whatever it puts around it; a template that hides it is refused."""

    def spelled(turns):
        parts = turns[0][1]
        shown = template if None in parts else template.replace("\n", "").replace("[/I]", "")
        return shown.format(i="<i>" * parts.count(None), t=parts[-1])

    assert image_text(spelled, shapes.processor, 1) == place
    hidden = lambda turns: "x" if None in turns[0][1] else f"a{turns[0][1][-1]}"  # noqa: E731
    with pytest.raises(mf.InputError, match="stands for an image"):
        image_text(hidden, shapes.processor, 1)
    assert image_text(hidden, shapes.processor, 0) == ""
