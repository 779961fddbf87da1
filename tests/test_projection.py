"""Recorded vectors in words, against what the model itself makes of them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import BUILD, FAMILIES

import mllm_fast as mf
from mllm_fast.core.errors import InputError

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
        ((0, None, 3), {}, "give the head too"),
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
