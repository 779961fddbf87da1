"""linears: large linear layers compute on the kernel inside the block, and on nothing of ours outside it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import tiny
import torch
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.paths import paths
from mllm_fast.kernels.skinny_linear import cpu_kernel
from PIL import Image
from torch import nn

import mllm_fast as mf
import mllm_fast.runtime.linear
from mllm_fast.runtime import direct_passes
from mllm_fast.runtime.linear import skinny_linears

needs_extension = pytest.mark.skipif(cpu_extension()[0] is None, reason="the C++ extension is not built")


class Text:
    """As much of a TextModel as the block looks at."""

    def __init__(self):
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10), nn.Linear(10, 300))
        self.head = nn.Linear(300, 500, bias=False)

    def __call__(self, x):
        return self.head(self.decoder(x))

    def layers(self):
        return [*self.decoder, self.head]


@pytest.fixture
def served(monkeypatch):
    """Shapes of the weights that the kernel was given."""
    seen = []

    def spy(x, weight, bias):
        seen.append(tuple(weight.shape))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(mllm_fast.runtime.linear, "skinny_linear", spy)
    return seen


def test_only_the_large_layers_and_only_inside(served):
    text, x = Text(), torch.randn(2, 300)
    with torch.inference_mode():
        expected = text(x)
        with skinny_linears(text):
            assert torch.equal(text(x), expected)
        assert served == [(300, 300), (500, 300)]
        text(x)
    assert len(served) == 2
    assert not any("forward" in vars(layer) for layer in text.layers())


def test_the_kernel_is_as_right_as_torch():
    text, x = Text(), torch.randn(5, 300)
    with torch.inference_mode():
        low = text(x)
        with skinny_linears(text):
            got = text(x)
        wide = Text()
        wide.decoder.double(), wide.head.double()
        truth = wide(x.double())
    assert (got - truth).abs().max() <= 2 * (low - truth).abs().max() + torch.finfo(torch.float32).eps


def test_restored_after_an_exception():
    text = Text()
    with pytest.raises(RuntimeError, match="on purpose"), skinny_linears(text):
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(layer) for layer in text.layers())


def test_gradients_take_torchs_way():
    text, x = Text(), torch.randn(2, 300)
    text(x).sum().backward()
    expected = text.head.weight.grad
    text.head.weight.grad = None
    with skinny_linears(text):
        text(x).sum().backward()
    assert torch.equal(text.head.weight.grad, expected)


def test_autocast_takes_torchs_way(served):
    text, x = Text(), torch.randn(2, 300)
    with skinny_linears(text), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert text(x).dtype == torch.bfloat16
    assert not served


def test_someone_elses_forward_is_left_alone(served):
    text, x = Text(), torch.randn(2, 300)
    mine = text.head.forward
    text.head.forward = mine
    with torch.inference_mode(), skinny_linears(text):
        text(x)
    assert served == [(300, 300)]
    assert text.head.forward is mine


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_backends_leave_the_layers_as_they_are(served, backend):
    text, x = Text(), torch.randn(2, 300)
    with torch.inference_mode(), skinny_linears(text, backend):
        text(x)
    assert not served


@needs_extension
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_whole_model_answers_the_same(family, monkeypatch):
    """Every linear layer of a real text part on the C++ kernel, however small: the same words, maps to rounding."""
    monkeypatch.setattr(mllm_fast.runtime.linear, "worth_reading", lambda weight: True)
    monkeypatch.setattr(sys.modules["mllm_fast.kernels.skinny_linear"], "worth_reading", lambda weight: True)
    every = replace(paths(), rows={"float32": (1, 64), "bfloat16": (1, 8)})  # on whatever processor
    monkeypatch.setattr(sys.modules["mllm_fast.kernels.skinny_linear"], "paths", lambda: every)
    monkeypatch.setattr(direct_passes, "direct_decoder", lambda *_: None)  # the model's own layers
    shapes = []
    linear = cpu_kernel.linear
    monkeypatch.setattr(cpu_kernel, "linear", lambda x, *rest: shapes.append(len(x)) or linear(x, *rest))
    model, processor = getattr(tiny, family)()
    model = model.float().eval()
    image, question = Image.new("RGB", (40, 40), "red"), "what color is the circle ?"
    plain, ours = (
        mf.VLM(model, processor, backend=backend).explain(image, question, max_new_tokens=5)
        for backend in ("torch", "auto")
    )
    assert len(shapes) > 5 * 3 * 7  # tokens, layers, linear layers of one
    assert ours.text == plain.text
    torch.testing.assert_close(
        torch.as_tensor(ours.heatmap(0)), torch.as_tensor(plain.heatmap(0)), rtol=1e-3, atol=1e-5
    )
    assert not any("forward" in vars(module) for module in model.modules())
