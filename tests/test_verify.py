"""The causal check of a map, and the shares of attention, against full recomputation: another prompt pass under
`Knockout`, and the model's own eager attention."""

from __future__ import annotations

import json
import re

import knocked
import pytest
import torch
from knocked import Rule
from PIL import Image

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE
from mllm_fast.core.errors import InputError
from mllm_fast.explain import verify as verify_module
from mllm_fast.explain.explanation import Explanation
from mllm_fast.explain.figure import draw_token
from mllm_fast.explain.verification import Verification
from mllm_fast.knockout.attention_share import TYPES

QUESTION = "what color is the circle ?"
ANSWER = "red green , blue"
RULE = Rule("system", "query+generated", "except 1", (0, 2))
CASES = {"plain": ((), 1), "under a knockout": ((RULE,), 1), "two images": ((), 2), "both": ((RULE,), 2)}


@pytest.fixture(params=CASES)
def case(request, picture):
    rules, count = CASES[request.param]
    return rules, [picture, Image.new("RGB", (24, 64), "red")][:count]


def log_prob(vlm, images, rules, ids, token):
    """log p of the answer's token from one eager pass over the prompt and the answer's ids before it."""
    inputs, layouts, _ = vlm.prompts.prepare([images], [QUESTION])
    extra = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids[:token]], dtype=torch.long)], 1)
    if "mm_token_type_ids" in extra:
        extra["mm_token_type_ids"] = torch.nn.functional.pad(extra["mm_token_type_ids"], (0, token))
    with torch.no_grad(), knocked.eager(vlm, rules, layouts):
        logits = vlm.model(input_ids=whole, **extra).logits[0, -1]
    return float(torch.log_softmax(logits, -1)[ids[token]])


def chosen(ex, token, top, heads):
    """The positions of the map's highest and lowest patches, by its own scores."""
    scores = ex.position_scores(token, heads).sum(0)
    patches = ex.layout.segments["image"]
    order = sorted(patches.tolist(), key=lambda p: -float(scores[p]))
    count = max(1, -(-len(order) * top // 1))
    return tuple(order[: int(count)]), tuple(order[-int(count) :])


@pytest.mark.parametrize("generated", [False, True], ids=["forced", "generated"])
def test_changes_equal_full_recomputation(vlm, case, generated):
    """For every token: log p with all patches, and what is left without the highest and the lowest."""
    rules, images = case
    options = {"max_new_tokens": 3} if generated else {"answer": ANSWER}
    ex = vlm.explain(images, QUESTION, knockout=knocked.knockouts(rules), **options)
    found = ex.verify(0.2, 2, heads=3)
    assert ex.verification is found
    assert [v.token for v in found] == list(range(len(ex.tokens)))
    for token, v in enumerate(found):
        highest, lowest = chosen(ex, token, 0.2, 3)
        assert (v.count, v.of) == (len(highest), len(ex.layout.segments["image"]))
        plain = log_prob(vlm, images, rules, ex.token_ids, token)
        # log p is kept in float32, of logits up to about 20
        assert v.log_prob == pytest.approx(plain, abs=20 * 4 * 2**-23)
        for change, positions in ((v.top, highest), (v.lowest, lowest)):
            without = (*rules, Rule(positions, "query+generated", "all", (0, 1, 2)))
            expected = log_prob(vlm, images, without, ex.token_ids, token) - plain
            assert change == pytest.approx(expected, abs=20 * 8 * 2**-23)
    assert max(abs(v.top) for v in found) > 1e-2


def test_random_patches_are_drawn_anew_and_again(vlm, picture):
    """Controls differ from each other; a second call draws the same."""
    ex = vlm.explain(picture, QUESTION, ANSWER)
    first, again = ex.verify(0.1, 6, tokens=["green"]), ex.verify(0.1, 6, tokens=[1])
    assert first == again
    assert len(first) == 1
    assert first[0].token == 1
    assert len(set(first[0].random)) > 3
    assert ex.verify(0.1, 3, tokens=[1])[0].random == pytest.approx(first[0].random[:3], abs=1e-6)


def test_variants_in_several_batches(vlm, picture, monkeypatch):
    """Where the variants' caches do not fit together, they are run a few at a time."""
    ex = vlm.explain(picture, QUESTION, ANSWER)
    (together,) = ex.verify(0.1, 4, tokens=[2])
    monkeypatch.setattr(verify_module, "_CACHE_BYTES", 1)
    (apart,) = ex.verify(0.1, 4, tokens=[2])
    assert (apart.top, apart.lowest) == pytest.approx((together.top, together.lowest), abs=1e-5)
    assert apart.random == pytest.approx(together.random, abs=1e-5)


def test_verifying_changes_nothing(vlm, picture):
    ex = vlm.explain(picture, QUESTION, ANSWER)
    scores, said = ex.position_scores(1, "all"), vlm.generate(picture, QUESTION, max_new_tokens=4)
    keys = [k.clone() for k in ex.trace.keys]
    ex.verify()
    assert all(torch.equal(a, b) for a, b in zip(keys, ex.trace.keys, strict=True))
    assert torch.equal(ex.position_scores(1, "all"), scores)
    assert vlm.generate(picture, QUESTION, max_new_tokens=4).token_ids == said.token_ids


def test_bad_arguments(vlm, picture):
    ex = vlm.explain(picture, QUESTION, ANSWER)
    for top in (0, 1, -0.1, 1.5):
        with pytest.raises(mf.InputError, match=f"top is a share .* between 0 and 1, got {top}"):
            ex.verify(top)
    with pytest.raises(mf.InputError, match="controls is at least 1, got 0"):
        ex.verify(controls=0)
    with pytest.raises(mf.InputError, match="'yellow' is not in the answer"):
        ex.verify(tokens=["yellow"])
    with pytest.raises(mf.InputError, match="heads is a number"):
        ex.verify(heads="most")
    step = next(vlm.stream(picture, QUESTION, explain=True))
    with pytest.raises(mf.InputError, match=r"made by stream.*use VLM.explain"):
        step.explanation.verify()


@pytest.mark.parametrize(
    ("top", "lowest", "random", "moved", "passed", "verdict"),
    [
        (-2.0, 0.0, (-0.5, -1.0), True, True, "the map holds"),
        (-2.0, 0.0, (-0.5, -2.5), True, False, "FAILS"),
        (-2.0, -3.0, (-0.5, -1.0), True, False, "FAILS"),
        (0.5, 1.0, (0.6, 0.7), True, False, "FAILS"),
        (-0.004, 0.0, (0.001, -0.002), False, False, "no small set of patches"),
        (-0.01, 0.0, (0.0, 0.0), True, True, "the map holds"),
        (0.0, 0.0, (0.0, -0.5), True, False, "FAILS"),
    ],
)
def test_verdicts(top, lowest, random, moved, passed, verdict):
    v = Verification(0, -0.1, 8, 144, top, lowest, random)
    assert (v.moved, v.passed) == (moved, passed)
    assert verdict in str(v)


def test_verdict_in_words():
    text = str(Verification(0, -0.1, 8, 144, -2.0, 0.001, (-0.5, -1.0)))
    assert text.startswith("without its 8 highest of 144 patches log p falls by 2.00, without random ones by 0.75")
    assert "(at most 1.00), without the lowest by 0.00: the map holds" in text


def test_a_right_map_passes_and_a_wrong_one_does_not(shapes, monkeypatch):
    """The embedded model's colour word, with its own map and with the map upside down."""
    ex = shapes.explain(SAMPLE, "what color is the star?")
    (right,) = ex.verify()
    assert right.passed, str(right)
    honest = Explanation.position_scores
    monkeypatch.setattr(Explanation, "position_scores", lambda *args: -honest(*args))
    ex.forget()
    (wrong,) = ex.verify()
    assert wrong.moved
    assert not wrong.passed, str(wrong)
    assert "FAILS" in str(wrong)


def own_shares(vlm, images, prompt, ids, rules=()):
    """Type -> [layers, heads], the mean over the rows of the answer's tokens but the last, which is not read."""
    inputs, (layout,), _ = vlm.prompts.prepare([images], [prompt])
    extra = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
    if "mm_token_type_ids" in extra:
        extra["mm_token_type_ids"] = torch.nn.functional.pad(extra["mm_token_type_ids"], (0, len(ids)))
    with torch.no_grad(), knocked.eager(vlm, rules, [layout]):
        attentions = vlm.model(input_ids=whole, output_attentions=True, **extra).attentions
    rows = torch.stack([a[0, :, layout.prompt_length :] for a in attentions]).mean(2)
    return {name: rows[..., knocked.members(layout, name, whole.shape[1])].sum(-1) for name in TYPES}


def assert_shares(share, own, tolerance=2**-22):  # of shares kept in float32
    assert list(share) == [name for name in TYPES if name in share]
    assert set(share) == set(own) - {"image_separator"} or set(share) == set(own)
    for name, expected in own.items():
        if name not in share:  # the prompt has no such token
            assert not expected.any()
            continue
        assert share[name].dtype == torch.float32
        torch.testing.assert_close(share[name].double(), expected.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(sum(share.values()), torch.ones_like(share["image"]), rtol=0, atol=1e-6)


def read(said, count):
    """The answer's tokens whose rows were computed: not the last, unless an end of sequence followed it."""
    return said.token_ids if len(said.token_ids) < count else said.token_ids[:-1]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "suppress_tokens": [0, 2]}], ids=["greedy", "sampled"])
def test_attention_share_is_the_eager_mean(vlm, case, options):
    rules, images = case
    torch.manual_seed(1)
    knockout = knocked.knockouts(rules)
    said = vlm.generate(images, QUESTION, attention_share=True, knockout=knockout, max_new_tokens=5, **options)
    assert_shares(said.attention_share, own_shares(vlm, images, QUESTION, read(said, 5), rules))


def test_attention_share_of_a_padded_batch(vlm, picture):
    """Answers of several lengths: one that ends early counts its own passes alone."""
    images, prompts = [[picture], [picture, picture], [picture]], ["two", QUESTION, QUESTION + " red"]
    together = vlm.generate(images, prompts, attention_share=True, max_new_tokens=5)
    for said, image, prompt in zip(together, images, prompts, strict=True):
        assert_shares(said.attention_share, own_shares(vlm, image, prompt, read(said, 5)))


def test_attention_share_of_answers_that_end_early(shapes, picture):
    """The embedded model's answers end by themselves: of a short one in a batch, only its own rows count."""
    prompts = ["describe the image.", "how many objects are there?"]
    together = shapes.generate([picture, picture], prompts, attention_share=True)
    assert len(together[0].token_ids) > len(together[1].token_ids) == 1
    for said, prompt in zip(together, prompts, strict=True):
        own = own_shares(shapes, [picture], prompt, read(said, 32))
        assert_shares(said.attention_share, own, tolerance=2**-18)  # float32 roundings through six layers


def test_no_share_where_nothing_was_read(vlm, picture):
    assert vlm.generate(picture, QUESTION, attention_share=True, max_new_tokens=1).attention_share is None
    assert vlm.generate(picture, QUESTION, max_new_tokens=3).attention_share is None
    with pytest.raises(mf.InputError, match="attention_share follows one sequence, got num_beams=2"):
        vlm.generate(picture, QUESTION, attention_share=True, num_beams=2)


def test_a_verdict_is_about_one_map(shapes, tmp_path):
    """A map that points at the background does not hold where the default one does, and each is shown beside its own
    map alone: on the image, in the page, in the numbers."""
    ex = shapes.explain(Image.open(SAMPLE).convert("RGB"), "What color is the star?", "blue")
    (good,) = ex.verify()
    (bad,) = ex.verify(method="rollout")
    assert (good.verdict, good.method) == ("holds", "logprob")
    assert bad.verdict != "holds"
    assert "rollout" in str(bad)
    assert ex.verified(0, "rollout") is bad
    assert ex.verified(0) is ex.verified(0, "attention") is ex.verified(0, "random") is None
    ex.save(tmp_path / "a.html", method="rollout")
    page = (tmp_path / "a.html").read_text()
    data = json.loads(re.search(r"const data = (\{.*\});", page)[1])
    (token,) = data["tokens"]
    assert token["checks"]["extra"]["verdict"] == bad.verdict
    assert token["checks"]["all"] is token["checks"]["attention"] is None
    assert all(head["check"] is None for head in token["heads"])
    ex.save(tmp_path / "a.json", method="rollout")
    assert json.loads((tmp_path / "a.json").read_text())["tokens"][0]["verification"]["map"] == "rollout"
    drawn = {}
    for method in ("rollout", "logprob"):
        for state in ("checked", "not"):
            ex.verification = [bad] if state == "checked" else []
            drawn[method, state] = draw_token(ex, 0, method=method).tobytes()
    assert drawn["rollout", "checked"] != drawn["rollout", "not"]
    assert drawn["logprob", "checked"] == drawn["logprob", "not"]
    # the patches that are knocked out are those of the map: of a head, and of a map that needs another pass
    (layer, head, _), *_ = ex.top_heads(0, 1)
    for heads, method in (([(layer, head)], "logprob"), (10, "relevancy")):
        (found,) = ex.verify(heads=heads, method=method)
        assert ex.verified(0, method, heads) is found
        order = ex.layout.segments["image"][ex.attribution(0, method, heads).argsort(descending=True, stable=True)]
        logs = verify_module.log_probs(ex, 0, [order[:0], order[: found.count]])
        assert found.top == pytest.approx(float(logs[1] - logs[0]), abs=1e-4)  # float32, in another batch


def test_decoder_arguments_are_replayed_or_refused(built, picture, monkeypatch):
    """What a decoder gets beside embeddings and positions is given again, cut to the rows that run; what cannot be cut
    is refused by name."""
    vlm = mf.VLM(*built("llava"))
    decoder = vlm.text.decoder
    forward = type(decoder).forward

    def passing(given):
        """The model as it hands `given(rows)` to its decoder in every pass; the decoder adds a tensor of it."""

        def told(self, *args, extra=None, **kwargs):
            if extra is None:
                extra = given(kwargs["inputs_embeds"])
            added = extra if isinstance(extra, torch.Tensor) else extra[0]
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + added
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(decoder), "forward", told)

        def hand_over(module, args, kwargs):
            if kwargs.get("extra") is None:
                kwargs["extra"] = given(kwargs["inputs_embeds"])
            return args, kwargs

        return decoder.register_forward_pre_hook(hand_over, with_kwargs=True)

    def aligned(embeds):
        noise = torch.randn(1, 512, embeds.shape[-1], generator=torch.Generator().manual_seed(3), dtype=embeds.dtype)
        return noise[:, : embeds.shape[1]]

    handle = passing(aligned)
    try:
        ex = vlm.explain(picture, QUESTION, ANSWER)
        replayed = verify_module.log_probs(ex, 2, [torch.tensor([], dtype=torch.long)])
        rows = ex.trace.final[2]
        with torch.no_grad():
            whole = torch.log_softmax(vlm.text.logits(vlm.text.norm(rows)).double(), -1)[ex.token_ids[2]]
        assert float(replayed) == pytest.approx(float(whole), abs=1e-9)
    finally:
        handle.remove()
    handle = passing(lambda embeds: [aligned(embeds)])
    try:
        ex = vlm.explain(picture, QUESTION, ANSWER)
        assert ex.heatmap(0).isfinite().all()
        for ask in (ex.verify, lambda: ex.heatmap(0, "exhaustive"), lambda: ex.heatmap(0, "relevancy")):
            with pytest.raises(InputError, match="decoder was given 'extra'"):
                ask()
    finally:
        handle.remove()
