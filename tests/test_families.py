"""What must hold for a model of any type, shown on tiny random models of transformers' own classes."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from family_oracle import Double, Eager, Parts, added, full_cache, log_probs, run, writes
from PIL import Image

import mllm_fast as mf
from mllm_fast.runtime.hooks import recording
from mllm_fast.runtime.kv_cache import CACHE

QUESTION, ANSWER = "what color is the circle ?", "red green , blue"
NEAR = 1e-6
TEXT_TYPE = {"paligemma": 1, "paligemma2": 1}  # of text behind the prompt, 0 elsewhere
PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 90, 3), dtype=np.uint8))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Family:
    """A model with what the tests of its family share."""

    def __init__(self, name: str):
        self.name = name
        model, self.processor = families.build(name)
        self.model = model.double()
        self.vlm = mf.VLM(self.model, self.processor)
        self.parts = Parts.of(self.model)
        self.inputs, (self.layout,), _ = self.vlm.prompts.prepare([[PICTURE]], [QUESTION])
        self.inputs = dict(self.inputs)
        self.ids = self.processor.tokenizer(ANSWER, add_special_tokens=False).input_ids
        self.prompt = self.layout.length

    def said(self, count: int) -> list[int]:
        """What the model generates itself, over a cache that keeps every position, so that keys have their numbers."""
        options = {CACHE: full_cache(self.parts), "max_new_tokens": count, "do_sample": False}
        return self.model.generate(**self.inputs, **options)[0, self.prompt :].tolist()

    def extended(self, ids: list[int]) -> dict:
        """The inputs with more tokens of text behind."""
        more = torch.tensor([ids])
        inputs = {**self.inputs, "input_ids": torch.cat([self.inputs["input_ids"], more], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(ids)), value=TEXT_TYPE.get(self.name, 0))
        return inputs


@pytest.fixture(scope="module", params=[name for name in families.BUILD if name != "mllama"])
def one(request):
    with Double():  # processors compute too
        return Family(request.param)


@pytest.fixture(autouse=True)
def _double():
    with Double():
        yield


@pytest.fixture
def near(record_property):
    """Compares with the oracle, and notes the largest error for docs/models.md."""

    def compare(got, wanted):
        record_property("error", f"{float((got - wanted).abs().max()):.0e}")
        torch.testing.assert_close(got, wanted, rtol=0, atol=NEAR)

    return compare


def test_logits_and_generation(one, near):
    """The model on this package's attention says what it says on its own, and in as many words."""
    own = run(one.parts, one.inputs).logits
    with recording(one.vlm.text, 1), torch.no_grad():
        got = one.model(**one.inputs).logits[0]
    near(got, own)
    with Eager(one.parts), torch.no_grad():
        said = one.said(6)
    plain = one.vlm.generate(PICTURE, QUESTION, max_new_tokens=6)
    shared = one.vlm.generate(PICTURE, QUESTION, max_new_tokens=6, attention_share=True)
    assert plain.token_ids == shared.token_ids == said[: len(plain.token_ids)]
    assert len(plain.token_ids) >= len([t for t in said if t not in (0, 2)])


@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_scores(one, norm, record_property):
    ex = one.vlm.explain(PICTURE, QUESTION, ANSWER, final_norm=norm)
    seen = run(one.parts, one.extended(one.ids[:-1]))
    worst, largest = 0.0, 0.0
    for t, token in enumerate(one.ids):
        row = one.prompt - 1 + t
        final = seen.final[row] if norm == "frozen" else None
        for layer in seen.alpha:
            base = log_probs(one.parts, seen.inputs[layer][row], final)[token]
            heads, positions = writes(one.parts, seen, layer, row)
            truth = log_probs(one.parts, seen.inputs[layer][row] + heads, final)[:, token] - base
            got = ex.head_scores[t, layer].double()
            worst, largest = max(worst, float((got - truth).abs().max())), max(largest, float(truth.abs().max()))
            if t == 1:
                each = log_probs(one.parts, seen.inputs[layer][row] + positions[:, : row + 1], final)[..., token] - base
                mine = ex.position_scores(t, [(layer, head) for head in range(len(heads))])[:, : row + 1].double()
                worst, largest = max(worst, float((mine - each).abs().max())), max(largest, float(each.abs().max()))
    record_property("error", f"{worst / largest:.0e}")
    assert worst <= NEAR * largest, f"{worst:.1e} of {largest:.2f}"


def test_an_answer_that_is_given(one):
    """Its scores are those that it has when it is generated."""
    special = one.processor.tokenizer.added_tokens_decoder  # which a random model may say
    said = one.vlm.explain(PICTURE, QUESTION, max_new_tokens=3, suppress_tokens=list(special))
    given = one.vlm.explain(PICTURE, QUESTION, said.token_ids)
    largest = said.head_scores.abs().max()
    assert (said.head_scores - given.head_scores).abs().max() <= NEAR * largest
    positions = [ex.position_scores(len(said.tokens) - 1, "all") for ex in (said, given)]
    assert (positions[0] - positions[1]).abs().max() <= NEAR * largest


def test_writes_add_up(one, record_property):
    """What the heads write and the bias are what the attention adds to the residual stream."""
    ex = one.vlm.explain(PICTURE, QUESTION, ANSWER)
    seen, text, trace, worst = run(one.parts, one.extended(one.ids[:-1])), one.vlm.text, ex.trace, 0.0
    for site, found in enumerate(text.sites):
        output = text.outputs[site]
        bias = torch.zeros(text.width) if output.bias is None else output.bias
        norm = text.post_norm(site)
        for t in range(len(one.ids)):
            write = sum(text.projection(site, head) @ trace.output[t, site, head] for head in range(found.num_heads))
            if trace.write_scale is not None:
                write = write * trace.write_scale[t, site]
            if norm is None:
                write = write + bias
            wanted = added(seen, found.layer)[one.prompt - 1 + t]
            worst = max(worst, float((write - wanted).norm() / wanted.norm()))
    record_property("error", f"{worst:.0e}")
    assert worst <= 1e-10


def test_knockouts(one, near):
    image, query = one.layout.positions("image"), one.layout.positions("query")

    def close(rows, keys):
        closed = torch.zeros(keys, keys, dtype=torch.bool)
        closed[torch.cat([query, torch.arange(one.prompt, keys)])[:, None], image[None]] = True
        return closed[keys - rows :]

    wanted = run(one.parts, one.inputs, close).logits
    plan = one.vlm.plan(mf.Knockout("image", "query+generated"), [one.layout])
    with recording(one.vlm.text, 1, plan), torch.no_grad():
        got = one.model(**one.inputs).logits[0]
    near(got, wanted)
    with Eager(one.parts, close), torch.no_grad():
        said = one.said(4)
    rule = mf.Knockout("image", "query+generated")
    mine = one.vlm.generate(PICTURE, QUESTION, knockout=rule, max_new_tokens=4).token_ids
    assert mine == said[: len(mine)]


@pytest.mark.parametrize("name", ["internvl_qwen3", "llava_next", "idefics3", "mistral3"])
def test_a_block_knocked_out_of_the_text_leaves_nothing_of_the_picture(name):
    """Row ends and marks around the image see it too: image -> query leaves these ways open."""
    vlm = mf.VLM(families.build(name)[0].double(), families.build(name)[1])
    other = Image.fromarray(255 - np.asarray(PICTURE))
    change = {}
    for rule in (mf.Knockout("image", "query"), mf.Knockout("image_block", "text")):
        found = []
        for picture in (PICTURE, other):
            inputs, layouts, _ = vlm.prompts.prepare([[picture]], [QUESTION])
            with recording(vlm.text, 0, vlm.plan(rule, layouts)), torch.no_grad():
                found.append(vlm.model(**inputs).logits[0, -1])
        change[rule.target] = float((found[0] - found[1]).abs().max())
    assert change["text"] == 0
    assert change["query"] > 1e-3
    segments = layouts[0].segments
    parts = torch.cat([segments[part] for part in ("image_block", "text", "generated")])
    assert torch.equal(parts.sort().values, torch.arange(layouts[0].length))


HYBRID = {"qwen3_5": "linear_attn", "qwen3_5_moe": "linear_attn", "lfm2_vl": "conv"}


@contextmanager
def zeros(parts, name, positions):
    """Zeros in the place of some rows of the prompt, where layers without attention read them."""

    def clear(_, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        if hidden.shape[1] > 1:
            hidden[:, positions] = 0
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    mixers = [getattr(layer, name) for layer in parts.layers if hasattr(layer, name)]
    handles = [mixer.register_forward_pre_hook(clear, with_kwargs=True) for mixer in mixers]
    try:
        yield len(mixers)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", HYBRID)
def test_zeros_for_layers_without_attention(name, near):
    """The state that they carry then holds nothing of the picture."""
    one = Family(name)
    image = one.layout.positions("image")
    after = torch.arange(int(image[-1]) + 1, one.prompt)

    def close(rows, keys):
        closed = torch.zeros(keys, keys, dtype=torch.bool)
        closed[torch.cat([after, torch.arange(one.prompt, keys)])[:, None], image[None]] = True
        return closed[keys - rows :]

    targets = tuple([*after.tolist(), *range(one.prompt, one.prompt + 8)])
    rule = mf.Knockout(tuple(image.tolist()), targets, zero_inputs=True)
    with zeros(one.parts, HYBRID[name], image) as count:
        wanted = run(one.parts, one.inputs, close).logits
        with Eager(one.parts, close), torch.no_grad():
            said = one.said(4)
    with recording(one.vlm.text, 1, one.vlm.plan(rule, [one.layout])), torch.no_grad():
        got = one.model(**one.inputs).logits[0]
    near(got, wanted)
    answer = one.vlm.generate(PICTURE, QUESTION, knockout=rule, max_new_tokens=4)
    assert answer.token_ids == said[: len(answer.token_ids)]
    assert answer.unreached_layers == ()
    other = Image.fromarray(255 - np.asarray(PICTURE))
    blind = [one.vlm.explain(p, QUESTION, ANSWER, knockout=rule).head_scores for p in (PICTURE, other)]
    torch.testing.assert_close(*blind, rtol=0, atol=NEAR)
    kept = replace(rule, zero_inputs=False)
    with pytest.warns(UserWarning, match="zero_inputs=True"):
        assert len(one.vlm.generate(PICTURE, QUESTION, knockout=kept, max_new_tokens=2).unreached_layers) == count
    seen = [one.vlm.explain(p, QUESTION, ANSWER, knockout=kept).head_scores for p in (PICTURE, other)]
    assert (seen[0] - seen[1]).abs().max() > 0.01


def test_a_knockout_that_closes_nothing(one, near):
    own = run(one.parts, one.inputs).logits
    plan = one.vlm.plan(mf.Knockout((one.prompt + 3,), (0,)), [one.layout])
    with recording(one.vlm.text, 1, plan), torch.no_grad():
        got = one.model(**one.inputs).logits[0]
    near(got, own)


def test_contexts(one, near, tmp_path):
    """A context that keeps everything is the whole sequence."""
    if one.vlm.text.findings.others and CACHE != "cache":
        with pytest.raises(mf.InputError, match="newer release of transformers"):
            one.vlm.compress(PICTURE, prompt=QUESTION)
        return
    context = one.vlm.compress(PICTURE, keep=1.0, prompt=QUESTION, score="query")
    ids = list(context.questions.ids("is the circle red ?", context.vlm.settings(3)))
    wanted = run(one.parts, one.extended(ids)).logits[-1]
    session = context.questions.decoder(1)
    with context.questions.running(), session.recording():
        got = session.read([ids])[0]
    near(got, wanted)
    context.save(tmp_path / "a.safetensors")
    loaded = mf.Context.load(tmp_path / "a.safetensors", one.vlm)
    again = loaded.questions.decoder(1)
    with loaded.questions.running(), again.recording():
        assert torch.equal(again.read([ids])[0], got)
    assert torch.equal(loaded.layout.separators, context.layout.separators)
    own = one.vlm.generate(PICTURE, QUESTION, max_new_tokens=4)
    assert context.describe(max_new_tokens=4).token_ids == own.token_ids
    small = one.vlm.compress(PICTURE, keep=0.3, prompt=QUESTION, score="generated", max_new_tokens=4)
    assert small.ask("is the circle red ?", max_new_tokens=3).input_ids is not None


def test_maps_that_run_the_model_again(one, near):
    """Replays are the sequence as it was: gradients and verdicts equal whole-sequence recomputation."""
    ex = one.vlm.explain(PICTURE, QUESTION, ANSWER)
    seen = run(one.parts, one.extended(one.ids[:-1]))
    row = one.prompt + 1
    with torch.no_grad():
        hidden = ex.replay.hidden_states(row + 1)
        normed = one.parts.norm(seen.final[: row + 1])
    near(hidden, normed)
    checked = ex.verify(tokens=[1], controls=2)[0]
    assert abs(checked.log_prob - float(torch.log_softmax(seen.logits[row - 1], -1)[one.ids[1]])) < NEAR
    for method in ("attention", "gradient-input"):
        assert ex.attribution(1, method).isfinite().all()


LAST = ("out_proj", "o_proj", "fc2", "down_proj", "attn.proj", "linear_fc2", "w2", "wo")


def patches_alone(model):
    """Make each image token depend on its own patch: the layers of the vision tower add nothing."""
    decoder = Parts.of(model).decoder
    inside = {id(module) for module in decoder.modules()}
    with torch.no_grad():
        for name, module in model.named_modules():
            in_tower = re.search(r"\.(layers|blocks|layer|resblocks)\.", name) and id(module) not in inside
            if in_tower and name.endswith(LAST):
                for parameter in module.parameters():
                    parameter.zero_()


TILED = [name for name in families.BUILD if name not in ("mllama", "gemma3_short", "gemma4_shared")]


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("size", [(90, 40), (50, 61)])
def test_each_tile_covers_its_box(name, size):
    """Of the tokens of each tile, the one whose box holds a painted square changes most."""
    model, processor = families.build(name)
    patches_alone(model)
    vlm = mf.VLM(model.double(), processor)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)

    def tokens(array):
        inputs, (layout,), _ = vlm.prompts.prepare([[Image.fromarray(array)]], ["what"])
        seen = []
        take = lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        handle = vlm.text.layers[0].register_forward_pre_hook(take, with_kwargs=True)
        with torch.no_grad():
            vlm.model(**inputs)
        handle.remove()
        return seen[0][0, layout.images[0].positions], layout.images[0]

    before, layout = tokens(pixels)
    assert len(layout.positions) == sum(tile.rows * tile.cols for tile in layout.tiles)
    rng = np.random.default_rng(1)
    for _ in range(6):
        x, y = int(rng.integers(2, size[0] - 8)), int(rng.integers(2, size[1] - 8))
        painted = pixels.copy()
        painted[y : y + 6, x : x + 6] = 255 - painted[y : y + 6, x : x + 6]
        change, first = (tokens(painted)[0] - before).norm(dim=-1), 0
        for tile in layout.tiles:
            count = tile.rows * tile.cols
            if not count:
                continue
            part, boxes = change[first : first + count], tile.token_boxes()
            first += count
            centre = (x + 3, y + 3)
            if not (tile.box[0] <= centre[0] < tile.box[2] and tile.box[1] <= centre[1] < tile.box[3]):
                continue
            left, top, right, bottom = boxes[int(part.argmax())]
            assert left - 4 <= centre[0] <= right + 4
            assert top - 4 <= centre[1] <= bottom + 4


class Crossed:
    """A model with cross-attention, and what the tests need of it."""

    def __init__(self):
        model, self.processor = families.BUILD["mllama"]()
        self.model = model.double()
        self.vlm = mf.VLM(self.model, self.processor)
        self.inputs, (self.layout,), _ = self.vlm.prompts.prepare([[PICTURE]], [QUESTION])
        self.crossed = [layer for layer in Parts.of(self.model).layers if hasattr(layer, "cross_attn")]


@contextmanager
def blind(crossed: Crossed, rows):
    """Rows that read nothing from the image: zeros from the heads of every layer of cross-attention."""

    def clear(_, args):
        given = args[0].clone()
        given[:, [row for row in rows if row < given.shape[1]] if given.shape[1] > 1 else slice(None)] = 0
        return (given,)

    handles = [layer.cross_attn.o_proj.register_forward_pre_hook(clear) for layer in crossed.crossed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_cross_attention_is_knocked_out(near):
    """Its image keys lie outside the sequence; a row that may not attend to the image's token sees none of them."""
    one = Crossed()
    assert len(one.crossed) == 2
    image, after = one.layout.positions("image"), one.layout.positions("query")
    parts = Parts.of(one.model)

    def close(rows, keys):
        closed = torch.zeros(keys, keys, dtype=torch.bool)
        closed[torch.cat([after, torch.arange(one.layout.length, keys)])[:, None], image[None]] = True
        return closed[keys - rows :]

    rule = mf.Knockout("image", "query+generated")
    with blind(one, after.tolist()), Eager(parts, close), torch.no_grad():
        wanted = one.model(**one.inputs).logits[0]
        said = one.model.generate(**one.inputs, max_new_tokens=4, do_sample=False)[0, one.layout.length :].tolist()
    with recording(one.vlm.text, 0, one.vlm.plan(rule, [one.layout])), torch.no_grad():
        got = one.model(**one.inputs).logits[0]
    near(got, wanted)
    answer = one.vlm.generate(PICTURE, QUESTION, knockout=rule, max_new_tokens=4, attention_share=True)
    assert answer.token_ids == said[: len(answer.token_ids)]
    assert answer.unreached_layers == ()
    layers = [i for i, layer in enumerate(parts.layers) if hasattr(layer, "cross_attn")]
    assert (answer.attention_share["image"][layers] == 0).all()
    plain = one.vlm.generate(PICTURE, QUESTION, max_new_tokens=4, attention_share=True)
    with Eager(parts), torch.no_grad():
        said = one.model.generate(**one.inputs, max_new_tokens=4, do_sample=False)[0, one.layout.length :].tolist()
    assert plain.token_ids == said[: len(plain.token_ids)]
    assert (plain.attention_share["image"][layers] == 1).all()


def test_cross_attention_is_refused_by_name():
    """What would have to explain or keep keys outside the sequence. It generates as ever."""
    vlm = Crossed().vlm
    model = vlm.model
    assert len(vlm.generate(PICTURE, QUESTION, max_new_tokens=3).input_ids) > 3
    calls = [lambda: vlm.explain(PICTURE, QUESTION, ANSWER)]
    if CACHE == "cache":  # an older release is refused for its own reason
        calls.append(lambda: vlm.compress(PICTURE, prompt=QUESTION))
    for call in calls:
        with pytest.raises(mf.InputError, match=r"MllamaTextCrossAttention attends.*cross-attention"):
            call()
    assert not str(model.config.get_text_config()._attn_implementation).startswith("mllm_fast")
