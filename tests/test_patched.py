"""`with vlm.knocked_out(...)` and `vlm.recording()`: other people's code runs the model, and what it generates is what
`vlm.generate(knockout=...)` and `vlm.explain` give."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image
from transformers import AttentionInterface, DynamicCache, pipeline

import mllm_fast as mf
from mllm_fast.runtime.kv_cache import CACHE, cache_of

QUESTION = "what color is the circle ?"
SHORT = "describe this"
RULES = {
    "image->query": (mf.Knockout("image", "query"),),
    "image->generated": (mf.Knockout("image", "generated", "from 1"), mf.Knockout("system", "query+generated", [0])),
    "positions": (mf.Knockout((0, 1, 5, 19), (9, 22, 27, 60), "all"),),
}
BLUE = Image.new("RGB", (70, 50), "blue")


@pytest.fixture(params=RULES)
def rules(request):
    return RULES[request.param]


@pytest.fixture(scope="module")
def vlms():
    """Models that are the same in every bit: what two runs say can be compared token for token."""
    made = {}

    def vlm_of(family):
        if family not in made:
            made[family] = mf.VLM(*tiny.BUILD[family]())
        return made[family]

    return vlm_of


def inputs_of(vlm, pictures, prompts):
    return vlm.prompts.inputs([[one] for one in pictures], prompts)


def state(vlm):
    model = vlm.model
    return (
        vlm.text.config._attn_implementation,
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        {name: value for name, value in vars(model).items() if callable(value)},
        set(AttentionInterface._global_mapping),
    )


def test_generate_in_a_block(family, vlms, picture, rules):
    vlm = vlms(family)
    expected = vlm.generate(picture, QUESTION, knockout=rules, max_new_tokens=8)
    before = state(vlm)  # after a pass: transformers hooks what it captures on the first one
    free = vlm.generate(picture, QUESTION, max_new_tokens=8)
    inputs = inputs_of(vlm, [picture], [QUESTION])
    with vlm.knocked_out(*rules):
        output = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output[0].tolist()[: len(expected.input_ids)] == expected.input_ids.tolist()
    assert state(vlm) == before
    outside = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert outside[0].tolist()[: len(free.input_ids)] == free.input_ids.tolist()


@pytest.mark.parametrize("name", ["image->query", "image->generated"])
def test_a_batch_with_padding(family, vlms, picture, name):
    vlm, rules = vlms(family), RULES[name]
    expected = vlm.generate([picture, BLUE], [QUESTION, SHORT], knockout=rules, max_new_tokens=6)
    inputs = inputs_of(vlm, [picture, BLUE], [QUESTION, SHORT])
    with vlm.knocked_out(*rules):
        output = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    stop = vlm.settings().stop_ids
    start = inputs["input_ids"].shape[1]
    for said, row in zip(expected, output.tolist(), strict=True):
        ids = row[start:]
        while ids and ids[-1] in stop:
            ids.pop()
        assert ids == said.token_ids


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}]
)
def test_beams_and_sampling(family, vlms, picture, options):
    vlm, rules = vlms(family), RULES["image->generated"]
    torch.manual_seed(1)
    expected = vlm.generate(picture, QUESTION, knockout=rules, max_new_tokens=6, **options)
    inputs = inputs_of(vlm, [picture], [QUESTION])
    with vlm.knocked_out(*rules):
        torch.manual_seed(1)
        output = vlm.model.generate(**inputs, max_new_tokens=6, **{"do_sample": False, **options})
    expected = expected if isinstance(expected, list) else [expected]  # one for each sequence
    for one, row in zip(expected, output.tolist(), strict=True):
        assert row[: len(one.input_ids)] == one.input_ids.tolist()


@pytest.mark.parametrize("cached", [True, False])
def test_a_loop_of_ones_own(family, vlms, picture, rules, cached):
    """A plain loop over the model, with a cache of its own or none."""
    vlm = vlms(family)
    never = [vlm.processor.image_token_id]  # which random weights would say, and no cache is there to tell it apart
    expected = vlm.generate(picture, QUESTION, knockout=rules, max_new_tokens=6, suppress_tokens=never)
    inputs = dict(inputs_of(vlm, [picture], [QUESTION]))
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]  # with which Qwen2.5-VL's own forward cannot take a single token
    cache = DynamicCache() if cached else None
    stop = vlm.settings().stop_ids
    with vlm.knocked_out(*rules), torch.no_grad():
        for step in range(6):
            fed = ids if step == 0 or not cached else ids[:, -1:]
            extra = inputs if step == 0 or not cached else {}
            if "mm_token_type_ids" in extra:
                kinds = extra["mm_token_type_ids"]
                extra = {
                    **extra,
                    "mm_token_type_ids": torch.nn.functional.pad(kinds, (0, fed.shape[1] - kinds.shape[1])),
                }
            given = {CACHE: cache} if cached else {}
            logits = vlm.model(input_ids=fed, use_cache=cached, **given, **extra).logits
            logits[:, -1, never] = -torch.inf
            token = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if int(token) in stop:
                break
    assert ids[0].tolist()[: len(expected.input_ids)] == expected.input_ids.tolist()


def test_a_pipeline_of_transformers(family, vlms, picture):
    vlm, rules = vlms(family), RULES["image->query"]
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}]
    expected = vlm.generate(picture, QUESTION, knockout=rules, max_new_tokens=6)
    asked = pipeline("image-text-to-text", model=vlm.model, processor=vlm.processor)
    with vlm.knocked_out(*rules):
        said = asked(text=messages, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})
    assert said[0]["generated_text"].strip() == expected.text


def test_what_is_generated_inside_is_explained(family, vlms, picture):
    vlm = vlms(family)
    expected = vlm.explain(picture, QUESTION, max_new_tokens=5)
    inputs = inputs_of(vlm, [picture], [QUESTION])
    with vlm.recording() as recorded:
        vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    ex = recorded.explanation(picture)
    assert ex.tokens == expected.tokens
    # the caller's own passes are the model's, those of `explain` may be run directly, which rounds otherwise
    torch.testing.assert_close(ex.head_scores, expected.head_scores, rtol=1e-4, atol=1e-5)
    for method in ("logprob", "attention", "rollout"):
        torch.testing.assert_close(ex.heatmap(0, method), expected.heatmap(0, method), rtol=1e-3, atol=1e-5)
    assert ex.layout.images[0].tiles == expected.layout.images[0].tiles
    assert QUESTION.split()[0] in ex.prompt


def test_each_sequence_of_a_batch_is_explained(family, vlms, picture):
    """Behind padding too: as if it were alone, to what a batch's other order of sums does."""
    vlm, pictures, prompts = vlms(family), [picture, BLUE], [QUESTION, SHORT]
    inputs = inputs_of(vlm, pictures, prompts)
    with vlm.recording(mf.Knockout("image", "generated")) as recorded:
        vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for i, (image, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        ex = recorded.explanation(image, i)
        alone = vlm.explain(image, prompt, ex.token_ids, knockout=mf.Knockout("image", "generated"))
        torch.testing.assert_close(ex.head_scores, alone.head_scores, rtol=2e-3, atol=2e-5)
        torch.testing.assert_close(ex.attention(0), alone.attention(0), rtol=2e-3, atol=2e-5)
        with pytest.raises(mf.InputError, match="keep too little"):
            ex.heatmap(0, "rollout")


def test_a_loop_of_ones_own_is_explained(family, vlms, picture):
    """What `generate` would have returned is given as output."""
    vlm = vlms(family)
    inputs = dict(inputs_of(vlm, [picture], [QUESTION]))
    ids, cache = inputs.pop("input_ids"), DynamicCache()
    del inputs["attention_mask"]
    with vlm.recording() as recorded, torch.no_grad():
        for step in range(3):
            fed, extra = (ids, inputs) if step == 0 else (ids[:, -1:], {})
            logits = vlm.model(input_ids=fed, use_cache=True, **{CACHE: cache}, **extra).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        with pytest.raises(mf.InputError, match="give what was generated as output="):
            recorded.explanation(picture)
    ex = recorded.explanation(picture, output=ids)
    expected = vlm.explain(picture, QUESTION, ex.token_ids)
    torch.testing.assert_close(ex.head_scores, expected.head_scores, rtol=2e-3, atol=2e-5)


def test_what_cannot_be_followed_is_refused(vlms, picture):
    vlm, rules = vlms("llava"), RULES["image->query"]
    inputs = inputs_of(vlm, [picture], [QUESTION])
    with torch.no_grad():
        outside = cache_of(vlm.model(**inputs, use_cache=True))
    before = state(vlm)
    one = inputs["input_ids"][:, :1]
    with torch.no_grad(), vlm.knocked_out(*rules):
        with pytest.raises(mf.InputError, match="filled outside this block"):
            vlm.model(input_ids=one, use_cache=True, **{CACHE: outside})
        with pytest.raises(mf.InputError, match="got inputs_embeds"):
            vlm.model(inputs_embeds=torch.zeros(1, 3, vlm.text.config.hidden_size))
        with pytest.raises(mf.InputError, match="called by itself"):
            vlm.text.decoder(input_ids=one)
        inside = cache_of(vlm.model(**inputs, use_cache=True))
        with pytest.raises(mf.InputError, match="one token a sequence"):
            vlm.model(input_ids=inputs["input_ids"][:, :2], use_cache=True, **{CACHE: inside})
        with pytest.raises(mf.InputError, match="is read from it"):
            vlm.model(**{**inputs, "attention_mask": inputs["attention_mask"][:, None, None].bool()})
        pair = {name: torch.cat([value, value]) for name, value in inputs.items()}
        of_two = cache_of(vlm.model(**pair, use_cache=True))
        of_two.batch_select_indices(torch.tensor([1]))
        with pytest.raises(mf.InputError, match="not known which is whose"):
            vlm.model(input_ids=one, use_cache=True, **{CACHE: of_two})
        with pytest.raises(RuntimeError, match="recorded already"):
            vlm.generate(picture, QUESTION, knockout=rules)
    with pytest.raises(mf.InputError, match="at least one Knockout"), vlm.knocked_out():
        pass
    with pytest.raises(ZeroDivisionError), vlm.knocked_out(*rules):
        1 / 0  # noqa: B018
    with vlm.recording() as recorded, pytest.raises(mf.InputError, match="not called inside"):
        recorded.explanation(picture)
    assert state(vlm) == before


def test_single_images_are_told_apart(family, vlms, picture):
    vlm = vlms(family)
    rules = (mf.Knockout("image:1", "query+generated"),)
    expected = vlm.generate([picture, BLUE], QUESTION, knockout=rules, max_new_tokens=5)
    inputs = vlm.prompts.inputs([[picture, BLUE]], [QUESTION])
    with vlm.knocked_out(*rules):
        output = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert output[0].tolist()[: len(expected.input_ids)] == expected.input_ids.tolist()
