"""Equivalence 2: under knockouts the model computes what its own eager attention computes under the additive mask of
arXiv 2411.17491, equation 3 (`knocked`), and after them it is as before. In float64, so that the tolerance (1e-9 on
logits of order 1 to 10) is rounding alone."""

from __future__ import annotations

import knocked
import numpy as np
import pytest
import tiny
import torch
from knocked import Rule, knockouts
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface

import mllm_fast as mf
from mllm_fast.knockout.plan import Plan, PlanRule, plan_of
from mllm_fast.knockout.rule import parse_layers
from mllm_fast.runtime.hooks import recording
from mllm_fast.shapes.questions import TASKS, ask
from mllm_fast.shapes.scenes import generate_scene

QUESTION = "what color is the circle ?"
SHORT = "describe this"
RULES = {
    "image to query": [Rule("image", "query", "all", (0, 1, 2))],
    "image to generated, later layers": [Rule("image", "generated", "from 1", (1, 2))],
    "image to both, around": [Rule("image", "query+generated", "except 1", (0, 2))],
    "system to the rest, first layer": [Rule("system", "image+query", "until 1", (0,))],
    "query to generated, some layers": [Rule("query", "generated", "0,2", (0, 2))],
    "positions": [Rule((0, 1, 5, 19), (3, 9, 22, 27), range(1, 3), (1, 2))],
    "several that overlap": [
        Rule("image", "query", "all", (0, 1, 2)),
        Rule("system+image", "generated", "from 1", (1, 2)),
        Rule((1, 2, 5, 6), "query+generated", "0-1", (0, 1)),
        Rule("system", (70, 71, 72), [2], (2,)),
    ],
}
RED = Image.new("RGB", (40, 40), "red")


@pytest.fixture(params=RULES)
def rules(request):
    return RULES[request.param]


def ours(vlm, rules, layouts, padding=None):
    return recording(vlm.text, 0, plan_of(knockouts(rules), layouts, len(vlm.text.layers), padding))


def both(vlm, rules, layouts, padding, run):
    """What `run` gives under our knockouts, and under the definition."""
    with torch.no_grad():
        with ours(vlm, rules, layouts, padding):
            inside = run()
        with knocked.eager(vlm, rules, layouts, padding):
            outside = run()
    return inside, outside


def decode(vlm, inputs, **options):
    settings = {"max_new_tokens": 6, "do_sample": False, **options}
    return vlm.model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)


def assert_same(a, b):
    assert torch.equal(a.sequences, b.sequences)
    for one, other in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_prefill_equals_the_definition(vlm, picture, rules):
    inputs, layouts, padding = vlm.prompts.prepare([[picture]], [QUESTION])
    inside, outside = both(vlm, rules, layouts, padding, lambda: vlm.model(**inputs).logits)
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-9)
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
    touched = [members.any() for rule in rules for members in [targets_in_prompt(rule, layouts[0])]]
    assert ((inside - plain).abs().max() > 1e-3) == any(touched), "the knockout must matter"


def targets_in_prompt(rule, layout):
    return knocked.members(layout, rule.target, layout.prompt_length + 99)[: layout.prompt_length]


def test_every_layer_has_sets_of_its_own(vlm, picture):
    """Layers may name more than 32 kinds of position together, as they would in a deep model."""
    inputs, layouts, padding = vlm.prompts.prepare([[picture]], [QUESTION])
    image, last = layouts[0].positions("image").tolist(), layouts[0].prompt_length - 1
    count = len(vlm.text.layers)
    rules = [
        Rule((image[(9 * layer + i) % len(image)],), (last - i,), (layer,), (layer,))
        for layer in range(count)
        for i in range(5)
    ]
    assert len({rule.source for rule in rules}) + 5 > 16
    inside, outside = both(vlm, rules * 3, layouts, padding, lambda: vlm.model(**inputs).logits)
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-9)
    deep = Plan([PlanRule((2 * i, 2 * i + 1), (200 + i,), (i,)) for i in range(80)], layouts, 80)
    for i, one in enumerate(deep.layers):
        ids = one.segments(1, 300)[0].long()
        closed = (one.table[ids][:, None] >> ids[None] & 1).nonzero().tolist()
        assert closed == [[200 + i, 2 * i], [200 + i, 2 * i + 1]]


def test_cached_decoding_equals_the_definition(vlm, picture, rules):
    inputs, layouts, padding = vlm.prompts.prepare([[picture]], [QUESTION])
    inside, outside = both(vlm, rules, layouts, padding, lambda: decode(vlm, inputs))
    assert_same(inside, outside)
    said = vlm.generate(picture, QUESTION, knockout=knockouts(rules), max_new_tokens=6)
    whole = inside.sequences[0].tolist()
    assert said.input_ids.tolist() == whole[: len(said.input_ids)]


def test_cache_equals_recomputing(vlm, picture, rules):
    """Generated tokens are in their sets when they are rows of one pass, too."""
    inputs, layouts, padding = vlm.prompts.prepare([[picture]], [QUESTION])
    with ours(vlm, rules, layouts, padding), torch.no_grad():
        picture_token = [vlm.processor.image_token_id]  # if said, it would be counted among the image's
        cached, anew = (decode(vlm, inputs, use_cache=c, suppress_tokens=picture_token) for c in (True, False))
    assert_same(cached, anew)


def test_generated_tokens_are_rows_and_keys(vlm, picture):
    """query -> generated changes the second token's logits on, not the first's: its row belongs to the query."""
    inputs, layouts, _ = vlm.prompts.prepare([[picture]], [QUESTION])
    with torch.no_grad():
        plain = decode(vlm, inputs)
        forced = plain.sequences[:, : layouts[0].prompt_length + 1]
        with ours(vlm, [Rule("query", "generated", "all", (0, 1, 2))], layouts):
            inside = decode(vlm, inputs)
    assert torch.equal(inside.sequences[:, : forced.shape[1]], forced)
    torch.testing.assert_close(inside.logits[0], plain.logits[0], rtol=0, atol=1e-9)
    assert (inside.logits[1] - plain.logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_padded_batches_equal_the_definition(vlm, picture, rules, options):
    """Two prompts of different lengths with different images: greedy, beams, samples with a seed."""
    inputs, layouts, padding = vlm.prompts.prepare([[picture], [RED]], [QUESTION, SHORT])
    assert sorted(padding)[0] == 0 < max(padding)

    def run():
        torch.manual_seed(3)
        return decode(vlm, inputs, **options)

    inside, outside = both(vlm, rules, layouts, padding, run)
    assert_same(inside, outside)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_batch_says_what_each_says_alone(vlm, picture, rules, options):
    pictures, prompts = [picture, RED, [RED, picture]], [SHORT, QUESTION + " red green", QUESTION]
    options = {"knockout": knockouts(rules), "max_new_tokens": 6, **options}
    together = vlm.generate(pictures, prompts, **options)
    for one, image, prompt in zip(together, pictures, prompts, strict=True):
        alone = vlm.generate(image, prompt, **options)
        assert (one.text, one.token_ids, one.tokens) == (alone.text, alone.token_ids, alone.tokens)
        assert torch.equal(one.input_ids, alone.input_ids)
        assert (one.layout.length, one.layout.prompt_length) == (alone.layout.length, alone.layout.prompt_length)
        for name, positions in alone.layout.segments.items():
            assert torch.equal(one.layout.segments[name], positions)


def test_positions_count_from_each_sequences_own_start(vlm, picture):
    """Positions are those of the answer's layout, wherever padding puts the sequence."""
    rule = mf.Knockout(range(4, 16), range(18, 99))
    texts = [vlm.generate(picture, p, knockout=rule, max_new_tokens=8).text for p in (SHORT, QUESTION)]
    both_said = vlm.generate([picture, picture], [SHORT, QUESTION], knockout=rule, max_new_tokens=8)
    assert [said.text for said in both_said] == texts


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_images(vlm, picture, which):
    inputs, layouts, padding = vlm.prompts.prepare([[picture, RED]], [QUESTION])
    rules = [Rule(f"image:{which}", "query+generated", "all", (0, 1, 2))]
    if which == 0:
        rules.append(Rule("image:0", "image:1", "from 2", (2,)))
    inside, outside = both(vlm, rules, layouts, padding, lambda: decode(vlm, inputs))
    assert_same(inside, outside)
    with torch.no_grad():
        assert (decode(vlm, inputs).logits[0] - inside.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "nothing", [None, (), [mf.Knockout((), "query")], [mf.Knockout("image", "query", ())]], ids=str
)
def test_no_knockout_is_the_models_own(vlm, picture, nothing):
    inputs, _ = vlm.prepare(picture, QUESTION)
    own = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    said = vlm.generate(picture, QUESTION, knockout=nothing, max_new_tokens=6)
    assert own.tolist()[: len(said.input_ids)] == said.input_ids.tolist()
    assert all(i in vlm.settings().stop_ids for i in own[len(said.input_ids) :].tolist())


def test_explanations_are_of_the_impaired_model(vlm, picture, rules):
    """Attention in an explanation under knockouts is 0 where a rule closes it, and sums to 1; forced = generated."""
    ex = vlm.explain(picture, QUESTION, "red green , blue", knockout=knockouts(rules))
    length = len(ex.input_ids)
    for token in range(len(ex.tokens)):
        row = ex.layout.prompt_length - 1 + token
        attention = ex.attention(token)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, ex.num_heads), rtol=0, atol=1e-6)
        for rule in rules:
            if knocked.members(ex.layout, rule.target, 200)[row]:
                closed = knocked.members(ex.layout, rule.source, 200)[:length]
                assert (attention[list(rule.numbers)][:, :, closed] == 0).all()
    inputs, layouts, _ = vlm.prompts.prepare([[picture]], [QUESTION])
    extra = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "mm_token_type_ids" in inputs:
        extra["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ex.tokens)))
    with torch.no_grad(), knocked.eager(vlm, rules, layouts):
        out = vlm.model(input_ids=ex.input_ids[None], output_attentions=True, **extra)
    for token in range(len(ex.tokens)):
        own = torch.stack([a[0, :, ex.layout.prompt_length - 1 + token] for a in out.attentions])
        torch.testing.assert_close(ex.attention(token).double(), own, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", range(8)),
        (" all ", range(8)),
        ("from 3", range(3, 8)),
        ("from 0", range(8)),
        ("until 3", range(3)),
        ("until 0", ()),
        ("except 2-5", (0, 1, 6, 7)),
        ("except 0,7", range(1, 7)),
        ("0-2,5", (0, 1, 2, 5)),
        ("3", (3,)),
        ((1, 4), (1, 4)),
        (range(6, 8), (6, 7)),
        ((), ()),
    ],
)
def test_layers(layers, expected):
    assert parse_layers(layers, 8) == frozenset(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image->query", mf.Knockout("image", "query")),
        (" image:1 -> query+generated @ from 4", mf.Knockout("image:1", "query+generated", "from 4")),
        ("5, 9-12->generated@0-3", mf.Knockout((5, 9, 10, 11, 12), "generated", "0-3")),
    ],
)
def test_parse(text, expected):
    """What a rule prints is what makes it again."""
    rule = mf.Knockout.parse(text)
    assert rule == expected
    assert mf.Knockout.parse(str(rule)) == rule


def test_parse_takes_layers_for_rules_without():
    assert mf.Knockout.parse("image->query", "from 2").layers == "from 2"
    assert mf.Knockout.parse("image->query@1", "from 2").layers == "1"
    assert str(mf.Knockout("image", [7, 3, 4, 5], (2, 0, 1))) == "image->3-5,7@0-2"


BAD = [
    (
        (mf.Knockout("picture", "query"),),
        "one of system, image, image_separator, query, generated, image_block, text, image:0, .*; got 'picture'",
    ),
    ((mf.Knockout("image+words", "query"),), "got 'words'"),
    ((mf.Knockout("image:1", "query"),), "got 'image:1'"),
    ((mf.Knockout("", "query"),), "got ''"),
    ((mf.Knockout("image", "query", [3]),), r"layers \(3,\): the model has layers 0 to 2, not 3"),
    ((mf.Knockout("image", "query", [-1]),), "layers 0 to 2, not -1"),
    ((mf.Knockout("image", "query", "from 3"),), "layers 'from 3': the model has layers 0 to 2, not 3"),
    ((mf.Knockout("image", "query", "except 1-4"),), "layers 0 to 2, not 3"),
    ((mf.Knockout("image", "query", "from 1-2"),), "'from' takes one number, got 'from 1-2'"),
    ((mf.Knockout("image", "query", "from"),), "numbers are given as 3 or 0-7 or 0-7,12, got ''"),
    ((mf.Knockout("image", "query", "2-1"),), "numbers are given as .*, got '2-1'"),
    ((mf.Knockout("image", "query", "most"),), "layers are numbers, .*, got 'most'"),
    ((mf.Knockout("image", "image"),), "would block position [0-9]+ from itself"),
    ((mf.Knockout("query", "query+generated"),), "would block position [0-9]+ from itself"),
    ((mf.Knockout("generated", "generated"),), "would block position [0-9]+ from itself"),
    ((mf.Knockout((5,), (1, 5)),), "would block position 5 from itself"),
    ((mf.Knockout((-1,), "query"),), "positions of a knockout are 0 or more, got -1"),
    ((mf.Knockout((5, 10**12), "query"),), "positions of a knockout are 0 to [0-9]+, the model's window; got 10{12}$"),
    (
        tuple(mf.Knockout((i,), (i + 1,)) for i in range(40)),
        "cut the sequence into 4[0-9] kinds of position in one layer, at most 32",
    ),
    (("image-query",), r'a knockout is "source->target" or "source->target@layers", in quotes, got .image-query.'),
    ((("image", "query"),), r"got \('image', 'query'\)"),
]


@pytest.mark.parametrize(("rules", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_rules_are_named(vlm, picture, rules, message):
    with pytest.raises(mf.InputError, match=message):
        vlm.generate(picture, QUESTION, knockout=rules)
    with pytest.raises(mf.InputError, match=message):
        vlm.explain(picture, QUESTION, "red", knockout=rules)


@pytest.mark.parametrize(
    "arguments",
    [
        {"source": 5, "target": "query"},
        {"source": ["image"], "target": "query"},
        {"source": None, "target": "query"},
        {"source": [1.5], "target": "query"},
        {"source": ["7"], "target": "query"},
        {"source": "image", "target": Ellipsis},
        {"source": "image", "target": "query", "layers": 3},
        {"source": "image", "target": "query", "layers": [2.5]},
    ],
    ids=str,
)
def test_bad_types_are_named(arguments):
    with pytest.raises(mf.InputError, match=r"(source|target|layers) of a knockout is a text or whole numbers, got"):
        mf.Knockout(**arguments)


def test_numbers_of_every_kind():
    """numpy's and torch's whole numbers, ranges and generators are kept as numbers."""
    given = [np.arange(3), torch.arange(3), range(3), (i for i in range(3))]
    assert len({mf.Knockout(one, "query", (1,)) for one in given}) == 1


@pytest.mark.parametrize("text", ["image", "->query", "image->", "image-query", " -> ", ""])
def test_bad_texts_are_named(text):
    with pytest.raises(mf.InputError, match='"source->target"') as error:
        mf.Knockout.parse(text)
    assert repr(text) in str(error.value)


def test_32_kinds_are_allowed(vlm, picture):
    """31 single positions and the rest: the largest table, all bits used."""
    rules = [Rule((i,), (i + 1,), "all", (0, 1, 2)) for i in range(30)]
    inputs, layouts, padding = vlm.prompts.prepare([[picture]], [QUESTION])
    inside, outside = both(vlm, rules[: layouts[0].prompt_length - 1], layouts, padding, lambda: decode(vlm, inputs))
    assert_same(inside, outside)


def state(vlm):
    names = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    hooks = [m for m in vlm.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    configs = vlm.model.config, vlm.text.config, vlm.model.config.vision_config
    return names, hooks, [c._attn_implementation for c in configs]


@pytest.mark.parametrize("leave", ["normally", "in the middle of a pass"])
def test_everything_is_restored(vlm, picture, leave):
    inputs, _ = vlm.prepare(picture, QUESTION)
    with torch.no_grad():
        before, was = vlm.model(**inputs).logits, state(vlm)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_):
        raise Stop

    handle = vlm.text.layers[1].mlp.register_forward_hook(stop) if leave != "normally" else None
    try:
        vlm.generate(picture, QUESTION, knockout=mf.Knockout("image", "query"), max_new_tokens=3)
    except Stop:
        assert handle is not None
    else:
        assert handle is None
    finally:
        if handle is not None:
            handle.remove()
    assert state(vlm) == was
    with torch.no_grad():
        assert torch.equal(vlm.model(**inputs).logits, before)
    again = vlm.generate(picture, QUESTION, knockout=mf.Knockout("image", "query"), max_new_tokens=3)
    assert again.token_ids


def test_gradients_flow_outside(vlm, picture):
    inputs, _ = vlm.prepare(picture, QUESTION)
    vlm.generate(picture, QUESTION, knockout=mf.Knockout("image", "query"), max_new_tokens=2)
    loss = vlm.model(**inputs).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, [vlm.text.outputs[0].weight])
    assert gradient.abs().sum() > 0


def test_sliding_window_and_knockout():
    """A knockout on top of a rule of transformers that is not plain causal attention."""
    part = tiny.sliding(5)
    ids = torch.randint(4, 20, (1, 23), generator=torch.Generator().manual_seed(1))
    layout = mf.TokenLayout(23, 23, ())
    sources, targets = (6, 7, 8), (9, 10, 12, 20)
    plan = plan_of(mf.Knockout(sources, targets, [0, 2]), [layout], 3)
    rule = [Rule(sources, targets, "", (0, 2))]

    class Holder:
        text, model = part, part.decoder

    with torch.no_grad():
        with knocked.eager(Holder, rule, [layout]):
            outside = part.decoder(input_ids=ids, use_cache=False).last_hidden_state
        with recording(part, 0, plan):
            inside = part.decoder(input_ids=ids, use_cache=False).last_hidden_state
        with recording(part, 0):
            open_to_all = part.decoder(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-9)
    assert (open_to_all - inside).abs().max() > 1e-3


@pytest.fixture(scope="module")
def asked():
    """12 scenes with a question each, of every kind."""
    rng = np.random.default_rng(5)
    pictures, prompts = [], []
    while len(prompts) < 12:
        scene = generate_scene(rng)
        question = ask(scene, rng, TASKS[len(prompts) % len(TASKS)])
        if question is not None:
            pictures.append(scene.image)
            prompts.append(question.text)
    return pictures, prompts


@pytest.mark.parametrize("rule", knocked.image_rules(6), ids=lambda r: str(r.knockout))
def test_answers_of_the_embedded_model(shapes, asked, rule):
    """Greedy answers, in float32, word for word (benchmarks/knockout_answers.py does it for more scenes)."""
    assert len(shapes.text.layers) == 6
    assert knocked.differences(shapes, *asked, rule)[1] == []


def test_the_picture_matters(shapes, asked):
    """Without the image the embedded model answers otherwise: the answers above are not all the same."""
    plain = shapes.generate(*asked)
    blind = shapes.generate(*asked, knockout=mf.Knockout("image", "query+generated"))
    assert sum(a.text != b.text for a, b in zip(plain, blind, strict=True)) >= 6
