"""Recorded vectors in words, against what the model itself makes of them."""

from __future__ import annotations

import families
import knocked
import pytest
import tiny
import torch
from PIL import Image
from tiny import BUILD, FAMILIES

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.explain import logit_lens

PICTURE = Image.effect_noise((48, 40), 60).convert("RGB")


@pytest.fixture(scope="module", params=FAMILIES)
def explained(request):
    model, processor = BUILD[request.param]()
    vlm = mf.VLM(model.double(), processor)
    return vlm, vlm.explain(PICTURE, "what color is the circle ?", max_new_tokens=3)


def everything(ex, *where, **space) -> dict[str, float]:
    return dict(ex.project(0, *where, k=10**6, **space))


def test_behind_the_last_layer_stands_the_answer(explained):
    """The log-probabilities are the model's own for the first word."""
    vlm, ex = explained
    found = everything(ex, ex.num_layers)
    assert max(found, key=found.get) == vlm.processor.tokenizer.decode([ex.token_ids[0]])
    inputs, _ = vlm.prepare(PICTURE, "what color is the circle ?")
    with torch.no_grad():
        expected = torch.log_softmax(vlm.model(**inputs).logits[0, -1].float(), -1)
    words = [vlm.processor.tokenizer.decode([i]) for i in range(len(expected))]
    got = torch.tensor([found[word] for word in words])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_positions_sum_to_the_head(explained):
    """The change of the logits is linear in the write."""
    _, ex = explained
    for layer, head in ((0, 1), (ex.num_layers - 1, 0)):
        for space in ("unembedding", "embedding"):
            whole = everything(ex, layer, head, space=space)
            seen = range(ex.layout.prompt_length)
            parts = [everything(ex, layer, head, position, space=space) for position in seen]
            for word, value in whole.items():
                assert sum(part[word] for part in parts) == pytest.approx(value, abs=1e-4)


def test_a_layer_norm_takes_the_mean_off():
    model, processor = BUILD["llava"]()
    width = model.config.text_config.hidden_size
    norm = torch.nn.LayerNorm(width)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    model.model.language_model.norm = norm
    vlm = mf.VLM(model.double(), processor)
    ex = vlm.explain(PICTURE, "what color is the circle ?", "red")
    write = vlm.text.projection(1, 0).detach() @ ex.trace.output[0, 1, 0]
    scale = (ex.trace.final[0].var(correction=0) + norm.eps).rsqrt()
    expected = vlm.text.head.weight.detach() @ (norm.weight.detach() * (write - write.mean()) * scale)
    found = ex.project(0, 1, 0, k=3)
    assert [value for _, value in found] == pytest.approx(expected.topk(3).values.tolist(), rel=1e-5)


def test_the_embedding_space(explained):
    vlm, ex = explained
    table = vlm.text.decoder.get_input_embeddings().weight.detach()
    expected = table @ ex.trace.residual[0, 1]
    (word, value), *_ = ex.project(0, 1, space="embedding")
    assert value == pytest.approx(float(expected.max()), rel=1e-6)
    assert word == vlm.processor.tokenizer.decode([int(expected.argmax())])


def test_against_a_context():
    """What was kept is projected as from the whole cache; what was dropped cannot be."""
    model, processor = BUILD["llava"]()
    vlm = mf.VLM(model.double(), processor)
    context = vlm.compress(PICTURE, 4, "describe this", "query")
    ex = context.explain("what color is the circle ?", max_new_tokens=2)
    kept = context.kept(1).positions.tolist()
    image = context.layout.positions("image").tolist()
    ex.project(0, 1, 0, kept[0])
    dropped = next(position for position in image if position not in kept)
    with pytest.raises(InputError, match=f"position {dropped} is not among those"):
        ex.project(0, 1, 0, dropped)


def test_each_step_of_a_stream_has_it(explained):
    vlm, ex = explained
    step = next(iter(vlm.stream(PICTURE, "what color is the circle ?", explain=True)))
    assert step.explanation.project(0, ex.num_layers, k=3) == ex.project(0, ex.num_layers, k=3)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ((4,), {}, r"layer is 0 to 3 \(behind the last\), got 4"),
        ((3, 0), {}, "layer is 0 to 2, got 3"),
        ((0, 9), {}, "head is 0 to"),
        ((0, 0, -1), {}, "position -1 is not among"),
        ((0, 0, 10**6), {}, "is not among"),
        ((0,), {"space": "latent"}, "space is one of unembedding, embedding, got 'latent'"),
        ((0,), {"k": 0}, "k is at least 1"),
    ],
)
def test_bad_input(explained, where, options, message):
    _, ex = explained
    with pytest.raises(InputError, match=message):
        ex.project(0, *where, **options)


def test_any_layer_input_at_any_position(explained):
    """The whole sequence run once by the model itself; at layer 0 of an image token stands the visual embedding."""
    vlm, ex = explained
    given = knocked.whole(vlm, ex.images, ex.prompt, ex.token_ids)
    with torch.no_grad(), tiny.eager(vlm.model):
        hidden = vlm.model(**given, output_hidden_states=True).hidden_states
    table = vlm.text.decoder.get_input_embeddings().weight.detach()
    image = int(ex.layout.images[0].positions[2])
    for position in (image, ex.layout.prompt_length - 3):
        for layer in range(ex.num_layers):
            vector = logit_lens.vector_at(ex, logit_lens.Place(1, layer, "residual", position))
            torch.testing.assert_close(vector, hidden[layer][0, position], rtol=0, atol=1e-9)
    (word, value), *_ = ex.project(1, 0, position=image, space="embedding")
    wanted = table @ hidden[0][0, image]
    assert (word, value) == (vlm.processor.tokenizer.decode([int(wanted.argmax())]), pytest.approx(float(wanted.max())))
    with pytest.raises(InputError, match=r"position is 0 to [0-9]+, those that the token sees"):
        ex.project(0, 1, position=10**4)


def test_attention_and_mlp_are_what_a_layer_adds(explained):
    vlm, ex = explained
    row = ex.trace.rows[1]
    for layer in range(ex.num_layers):
        place = lambda part, position=None, layer=layer: logit_lens.Place(1, layer, part, position)  # noqa: E731
        attention, mlp = (logit_lens.vector_at(ex, place(part)) for part in ("attention", "mlp"))
        after = ex.trace.final[1] if layer + 1 == ex.num_layers else ex.trace.residual[1, layer + 1]
        torch.testing.assert_close(ex.trace.residual[1, layer] + attention + mlp, after, rtol=0, atol=1e-9)
        heads = sum(logit_lens.write_of(ex, 1, layer, head, None) for head in range(ex.num_heads))
        bias = vlm.text.outputs[layer].bias
        torch.testing.assert_close(attention, heads if bias is None else heads + bias, rtol=0, atol=1e-9)
        torch.testing.assert_close(logit_lens.vector_at(ex, place("mlp", row)), mlp, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["gemma3", "granite_vision", "qwen3_5", "cohere2_vision"])
def test_what_is_added_passes_norms_and_multipliers(name):
    model, processor = families.build(name)
    vlm = mf.VLM(model.double(), processor)
    ex = vlm.explain(PICTURE, "what color is the circle ?", "red blue")
    for site in vlm.text.sites:
        attention = logit_lens.vector_at(ex, logit_lens.Place(1, site.layer, "attention"))
        heads = sum(logit_lens.write_of(ex, 1, site.layer, head, None) for head in range(site.num_heads))
        torch.testing.assert_close(attention, heads.to(attention), rtol=1e-6, atol=1e-6)
    others = list(vlm.text.findings.others)
    if others:
        with pytest.raises(InputError, match="has no attention heads"):
            ex.project(1, others[0], "mlp")


def test_ranks_and_the_logit_difference_by_hand(explained):
    """Equation 7 is the difference of two words' logits under the statistics of the final row."""
    vlm, ex = explained
    words = ["red", "blue", 7]
    ids = [int(vlm.prompts.answer_ids(word)[0]) if isinstance(word, str) else word for word in words]
    norm = vlm.text.norm
    scale = torch.rsqrt(ex.trace.final[0].square().mean() + norm.variance_epsilon)
    vector = ex.trace.residual[0, 1]
    logits = vlm.text.head.weight.detach() @ (norm.weight.detach() * vector * scale)
    found = ex.ranks(words, 0, 1, final_norm="frozen")
    assert [rank for rank, _ in found] == [1 + int((logits > logits[i]).sum()) for i in ids]
    assert found[0][1] - found[1][1] == pytest.approx(float(logits[ids[0]] - logits[ids[1]]), rel=1e-5)
    own = torch.log_softmax(vlm.text.logits(norm(vector)), -1)
    assert ex.ranks(words, 0, 1)[0][1] == pytest.approx(float(own[ids[0]].detach()), rel=1e-5)
    plain = vlm.text.head.weight.detach() @ vector
    assert ex.ranks(words, 0, 1, final_norm="none")[2][1] == pytest.approx(float(plain[7]), rel=1e-5)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((99,), "layer is 0 to"),
        ((0, 99), "head is 0 to"),
        ((0, "ffn"), "head is a number, or one of residual, attention, mlp, got 'ffn'"),
        ((0, None, -1), "position is 0 to"),
    ],
)
def test_places_that_are_not_there(explained, where, message):
    with pytest.raises(InputError, match=message):
        explained[1].project(0, *where)
    with pytest.raises(InputError, match="final_norm is one of own, frozen, none, got 'mine'"):
        explained[1].project(0, 0, final_norm="mine")


def test_the_words_of_every_patch(explained):
    """Layer by layer those of `project` at the patch's position; the embedding among the words' embeddings."""
    _, ex = explained
    found = ex.patch_words(k=2)
    positions = ex.layout.images[0].positions
    assert found.layers[0] == 0
    assert found.layers[-1] == ex.num_layers
    assert found.best.shape == (len(found.layers), len(positions), 2)
    for token in (0, len(positions) // 2, len(positions) - 1):
        for layer, words in found.of(token):
            space = "embedding" if layer == 0 else "unembedding"
            best = ex.project(0, layer, position=int(positions[token]), space=space, k=2)
            assert words == [word.strip() for word, _ in best]


def test_patches_are_read_in_parts(explained, monkeypatch):
    """With room for few vectors at a time the words are the same; a deep model has every fourth layer or so."""
    _, ex = explained
    whole = ex.patch_words()
    monkeypatch.setattr("mllm_fast.explain.patch_words._BYTES", 1)
    parts = ex.patch_words()
    assert parts.words == whole.words
    assert torch.equal(parts.best, whole.best)
    monkeypatch.setattr("mllm_fast.explain.patch_words._LAYERS", 2)
    assert ex.patch_words().layers == (0, ex.num_layers)
