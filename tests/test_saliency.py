"""Gradient alignment against one backward pass a box, in float64."""

from __future__ import annotations

import math

import owl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_fast.core.errors import InputError
from mllm_fast.explain.box_weights import BoxWeights
from mllm_fast.joint import last_layer
from mllm_fast.joint.saliency import FALLBACK, align


def loop(detector, tokens, query, direction):
    """The definition: of each box one backward pass through the model's own layer and heads."""
    dots, norms = [], []
    for box in range(len(tokens) - 1):
        leaf = tokens.clone().requires_grad_()
        hidden = detector.last_layer(leaf[None], None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        post = detector.vision.post_layernorm(hidden)
        feats = detector.model.layer_norm(post[:, 1:] * post[:, :1])
        logits, _ = detector.model.class_predictor(feats, query[None, None])
        (gradient,) = torch.autograd.grad(logits[0, box, 0], leaf)
        dots.append((gradient * direction).sum())
        norms.append(gradient.norm())
    return torch.stack(dots), torch.stack(norms)


def drawn(detector, seed):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return make(26, 30), make(24), make(26, 30)


@pytest.mark.parametrize("kind", owl.KINDS)
@pytest.mark.parametrize("heads", [1, 3, 5])
def test_structured_equals_a_loop_of_backward_passes(kind, heads):
    detector = owl.detector(kind, heads=heads)
    assert last_layer.has_known_form(detector)
    given = drawn(detector, heads)
    dots, norms = loop(detector, *given)
    for found in (last_layer.structured(detector, *given), last_layer.row_by_row(detector, *given, batch=7)):
        torch.testing.assert_close(found.norms, norms, rtol=1e-10, atol=0)
        scale = norms * given[2].norm()  # a dot product near 0 has no relative error to speak of
        assert float(((found.dots - dots) / scale).abs().max()) < 1e-12


def test_chunks_of_boxes_change_nothing(monkeypatch):
    detector = owl.detector()
    given = drawn(detector, 4)
    whole = last_layer.structured(detector, *given)
    monkeypatch.setattr(last_layer, "_ELEMENTS", 26 * 4 * 3 * 4)  # four boxes at a time
    parts = last_layer.structured(detector, *given)
    torch.testing.assert_close(parts.norms, whole.norms, rtol=1e-13, atol=0)


def test_class_token_carries_a_gradient():
    """Every box reads the class row, whose attention reads all tokens: leaving it out would show."""
    detector = owl.detector()
    tokens, query, direction = drawn(detector, 1)
    rows = last_layer._gradients(detector, last_layer._Attention(detector.last_layer, tokens).output, query)
    assert float(rows[:, 1].norm(dim=-1).min()) > 0.05 * float(rows[:, 0].norm(dim=-1).min())
    only = direction.clone()
    only[1:] = 0
    found = last_layer.structured(detector, tokens, query, only)
    torch.testing.assert_close(found.dots, loop(detector, tokens, query, only)[0], rtol=1e-9, atol=1e-13)


def test_float32_is_as_near_as_float32_allows():
    detector = owl.detector()
    given = drawn(detector, 2)
    dots, norms = loop(detector, *given)
    detector.model.float()
    single = [one.float() for one in given]
    by_loop = loop(detector, *single)
    found = last_layer.structured(detector, *single)
    scale = norms * given[2].norm()
    errors = [((one.double() - dots) / scale).abs().max() for one in (found.dots, by_loop[0])]
    assert errors[0] < 4 * errors[1] + 1e-7
    errors = [((one.double() - norms) / norms).abs().max() for one in (found.norms, by_loop[1])]
    assert errors[0] < 4 * errors[1] + 1e-7


def test_a_head_of_another_form_falls_back_and_says_so(monkeypatch):
    picture = Image.new("RGB", (50, 40), "gray")
    detector = owl.detector()
    vision = detector.see(picture)
    direction = drawn(detector, 3)[2]
    usual = align(detector, vision, "a photo of a circle", direction)
    assert usual.note == ""

    class Head(type(detector.model.class_head)):
        pass

    detector.model.class_head.__class__ = Head
    assert not last_layer.has_known_form(detector)
    monkeypatch.setattr("mllm_fast.joint.saliency.structured", None)  # is not called
    other = align(detector, vision, "a photo of a circle", direction)
    assert other.note == FALLBACK
    torch.testing.assert_close(other.cosines, usual.cosines, rtol=1e-5, atol=1e-7)


def test_a_hook_or_an_adapter_is_another_form():
    detector = owl.detector()
    handle = detector.last_layer.mlp.register_forward_hook(lambda *_: None)
    assert not last_layer.has_known_form(detector)
    handle.remove()
    assert last_layer.has_known_form(detector)

    class Adapted(torch.nn.Linear):
        pass

    detector.last_layer.self_attn.v_proj.__class__ = Adapted
    assert not last_layer.has_known_form(detector)


def test_weights_run_from_0_to_1_by_cosine():
    detector = owl.detector()
    vision = detector.see(Image.new("RGB", (64, 48), "red"))
    direction = drawn(detector, 5)[2]
    found = align(detector, vision, "a photo of a red circle", direction)
    query = detector.embed_queries(["a photo of a red circle"])[0].clone()
    dots, norms = loop(detector, vision.tokens.clone(), query, direction)
    expected = dots / norms / direction.norm()
    torch.testing.assert_close(found.cosines, expected.float(), rtol=1e-5, atol=1e-7)
    assert float(found.weights.min()) == 0
    assert float(found.weights.max()) == 1
    assert found.weights.argsort().tolist() == found.cosines.argsort().tolist()
    with pytest.raises(InputError, match="the direction is"):
        align(detector, vision, "a circle", direction[1:])


def test_a_direction_of_nothing_gives_no_weights():
    detector = owl.detector()
    vision = detector.see(Image.new("RGB", (64, 48), "red"))
    found = align(detector, vision, "a circle", torch.zeros_like(vision.tokens))
    assert found.weights.abs().max() == 0
    assert found.cosines.isfinite().all()


boxes = st.lists(
    st.tuples(*(st.floats(-20, 60) for _ in range(4))).map(
        lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(boxes, st.integers(0, 2**31))
def test_a_pixel_has_the_largest_weight_of_the_boxes_over_its_middle(corners, seed):
    weights = torch.rand(len(corners), generator=torch.Generator().manual_seed(seed))
    found = BoxWeights("q", weights, weights, weights, torch.tensor(corners, dtype=torch.float32), (23, 17))
    pixels = found.pixels()
    assert pixels.shape == (17, 23)
    edges = torch.tensor(corners, dtype=torch.float32).double().tolist()
    for y in range(0, 17, 3):
        for x in range(0, 23, 2):
            over = [
                float(w)
                for (left, top, right, bottom), w in zip(edges, weights, strict=True)
                if left <= x + 0.5 < right and top <= y + 0.5 < bottom
            ]
            assert math.isclose(float(pixels[y, x]), max(over, default=0.0), abs_tol=1e-7)
