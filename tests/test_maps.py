"""Other ways to draw a map, against dense arithmetic on the model's own eager attention."""

from __future__ import annotations

import gc
import threading
import warnings
from types import SimpleNamespace

import knocked
import numpy as np
import pytest
import torch
from knocked import Rule

import mllm_fast as mf
from mllm_fast.explain.methods.tam import less, rank_gaussian
from mllm_fast.explain.registry import HEATMAP_METHODS, methods_without_detector
from mllm_fast.explain.replay import Replay

QUESTION, ANSWER = "what color is the circle ?", "red circle , red"
RULES = {
    "no knockout": [],
    "knockouts": [Rule("image", "query", "from 1", (1, 2)), Rule((1, 2, 3), "generated", "all", (0, 1, 2))],
}


@pytest.fixture(scope="module", params=RULES)
def explained(request, family, built, picture):
    vlm, rules = mf.VLM(*built(family)), RULES[request.param]
    return vlm, rules, vlm.explain(picture, QUESTION, ANSWER, knockout=knocked.knockouts(rules))


@pytest.fixture(scope="module")
def dense(explained):
    """One eager pass over the whole sequence, everything materialised and in the graph; the decoder reads a leaf."""
    vlm, rules, ex = explained
    given = knocked.whole(vlm, ex.images, QUESTION, ex.token_ids)
    leaf: list[torch.Tensor] = []

    def hook(module, args, kwargs):
        leaf.append(kwargs["inputs_embeds"].detach().clone().requires_grad_())
        return args, kwargs | {"inputs_embeds": leaf[0]}

    handle = vlm.text.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.enable_grad(), knocked.eager(vlm, rules, [ex.layout]):
            out = vlm.model(**given, output_attentions=True, output_hidden_states=True)
    finally:
        handle.remove()
    return SimpleNamespace(
        embeds=leaf[0], logits=out.logits[0], alphas=out.attentions, hidden=out.hidden_states[-1][0].detach()
    )


def of(ex, values):
    return values.detach().float()[ex.layout.images[0].positions]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("token", [0, 3])
def test_rollout(explained, dense, token):
    _, _, ex = explained
    row = ex.layout.prompt_length - 1 + token
    product = torch.eye(row + 1, dtype=torch.float64)
    for alpha in dense.alphas:
        mean = alpha[0].detach().mean(0)[: row + 1, : row + 1]
        product = (mean + torch.eye(row + 1)) / 2 @ product
    close(ex.attribution(token, "rollout"), of(ex, product[row]))


@pytest.mark.parametrize("token", [0, 3])
def test_relevancy(explained, dense, token):
    _, _, ex = explained
    row = ex.layout.prompt_length - 1 + token
    logit = dense.logits[row, ex.token_ids[token]]
    gradients = torch.autograd.grad(logit, dense.alphas, retain_graph=True)
    relevance = torch.eye(dense.alphas[0].shape[-1], dtype=torch.float64)
    for alpha, gradient in zip(dense.alphas, gradients, strict=True):
        relevance = relevance + (alpha * gradient)[0].clamp(min=0).mean(0).detach() @ relevance
    close(ex.attribution(token, "relevancy"), of(ex, relevance[row]))


@pytest.mark.parametrize("token", [0, 3])
def test_gradient_times_input(explained, dense, token):
    _, _, ex = explained
    row = ex.layout.prompt_length - 1 + token
    log_prob = torch.log_softmax(dense.logits[row], -1)[ex.token_ids[token]]
    (gradient,) = torch.autograd.grad(log_prob, dense.embeds, retain_graph=True)
    close(ex.attribution(token, "gradient-input"), of(ex, (gradient * dense.embeds)[0].sum(-1)))


@pytest.mark.parametrize("token", [0, 3])
def test_token_activation(explained, dense, token):
    """Word by word, as the paper tells it."""
    _, _, ex = explained
    row, image = ex.layout.prompt_length - 1 + token, ex.layout.images[0]
    logits = dense.logits.detach()
    word, ids = ex.token_ids[token], ex.input_ids.tolist()
    own = logits[image.positions, word].clamp(min=0)
    mean, total = torch.zeros_like(own), 0.0
    for position in [*ex.layout.positions("query").tolist(), *range(ex.layout.prompt_length, row + 1)]:
        if ids[position] != word:
            weight = max(0.0, float(logits[position, word]))
            mean += weight * logits[image.positions, ids[position]].clamp(min=0)
            total += weight
    mean = mean / max(total, 1e-8)
    fit = np.linalg.lstsq(mean[:, None].numpy(), own.numpy(), rcond=None)[0][0] if mean.any() else 0.0
    left, start, parts = (own - fit * mean).clamp(min=0), 0, []
    for tile in image.tiles:
        part = left[start : start + tile.rows * tile.cols].reshape(tile.rows, tile.cols)
        parts.append(filtered(part.numpy()).flatten())
        start += tile.rows * tile.cols
    found, expected = ex.attribution(token, "tam"), torch.tensor(np.concatenate(parts)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def filtered(values: np.ndarray) -> np.ndarray:
    """The rank Gaussian filter, cell by cell."""
    padded = np.pad(values, 1, mode="reflect" if min(values.shape) > 1 else "edge")
    out = np.zeros_like(values)
    for i, j in np.ndindex(values.shape):
        window = np.sort(padded[i : i + 3, j : j + 3], axis=None)
        if window.mean() > 0:
            weight = np.exp(-(np.arange(-4, 5) ** 2) / (2 * max(window.std() / window.mean(), 1e-6) ** 2))
            out[i, j] = (window * weight).sum() / weight.sum()
    return out


def test_token_activation_by_hand():
    own, others = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 9.0]])
    assert less(own, others, torch.tensor([2.0, 0.0])).tolist() == [0.0, 0.0, 6.0]
    assert less(own, others, torch.zeros(2)).tolist() == own.tolist()
    flat = torch.full((4, 5), 3.0)
    assert rank_gaussian(flat).tolist() == flat.tolist()
    flat[1, 1] = 1e3  # one cell that stands out goes away
    assert rank_gaussian(flat)[1, 1] < 60
    assert rank_gaussian(torch.tensor([[1.0, 2.0]])).shape == (1, 2)


def test_exhaustive(explained, picture):
    """Each patch knocked out by a call of its own."""
    vlm, rules, ex = explained
    found = ex.attribution(2, "exhaustive")
    logs = {}
    for i in (None, 0, 5, len(found) - 1):
        gone = [] if i is None else [(int(ex.layout.images[0].positions[i]),)]
        given = knocked.whole(vlm, ex.images, QUESTION, ex.token_ids)
        rule = [Rule(one, "query+generated", "all", (0, 1, 2)) for one in gone]
        with torch.no_grad(), knocked.eager(vlm, [*rules, *rule], [ex.layout]):
            logits = vlm.model(**given).logits[0, ex.layout.prompt_length + 1]
        logs[i] = float(torch.log_softmax(logits, -1)[ex.token_ids[2]])
    for i in (0, 5, len(found) - 1):
        assert float(found[i]) == pytest.approx(logs[None] - logs[i], abs=1e-6)


def test_random_is_the_same_again(explained):
    _, _, ex = explained
    first = ex.attribution(1, "random")
    ex.forget()
    assert torch.equal(ex.attribution(1, "random"), first)
    assert not torch.equal(ex.attribution(1, "random"), ex.attribution(2, "random"))


def test_the_model_is_left_as_it_was(explained, monkeypatch):
    vlm, _, ex = explained
    weights = list(vlm.text.decoder.parameters())
    weights[0].requires_grad_(False)
    before = [weight.requires_grad for weight in weights], vlm.text.config._attn_implementation
    assert all(before[0][1:])
    for method in methods_without_detector():
        ex.heatmap(1, method)
    monkeypatch.setattr(vlm.text.layers[1].mlp, "forward", lambda hidden: 1 / 0)
    ex.forget()
    for method in ("relevancy", "gradient-input", "rollout"):
        with pytest.raises(ZeroDivisionError):
            ex.heatmap(1, method)
    assert ([weight.requires_grad for weight in weights], vlm.text.config._attn_implementation) == before
    assert all(weight.grad is None for weight in weights)


def test_nothing_is_left_behind(explained):
    """No array of attention outlives its map."""
    _, _, ex = explained
    size = ex.layout.prompt_length + 1
    ex.forget()

    def held() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of objects that do not like to be looked at
            found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        return sum(one.shape[-2:] == (size, size) for one in found)

    gc.collect()
    before = held()
    gc.disable()
    try:
        for method in ("relevancy", "rollout", "gradient-input"):
            ex.attribution(1, method)
        assert held() == before
    finally:
        gc.enable()


def test_other_threads_do_not_mix_in(built, picture):
    vlm = mf.VLM(*built("llava"))
    ex = vlm.explain(picture, QUESTION, ANSWER)
    ended = threading.Event()

    def others():
        while not ended.is_set():
            vlm.generate(picture, QUESTION, max_new_tokens=1)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        # in turn, as those of one position are kept
        found = {tuple(ex.replay.layer_inputs(5 + i % 2).shape) for i in range(20)}
    finally:
        ended.set()
        thread.join()
    assert found == {(ex.num_layers + 1, ex.trace.residual.shape[-1])}


@pytest.mark.parametrize("method", methods_without_detector())
def test_half_precision(method, picture):
    vlm = mf.VLM.from_pretrained("shapes", dtype="bfloat16")
    ex = vlm.explain(picture, "describe this", max_new_tokens=3)
    found = ex.heatmap(1, method)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_what_kept_too_little_says_so(explained, picture):
    vlm, _, ex = explained
    step = next(iter(vlm.stream(picture, QUESTION, explain=True)))
    for method in ("rollout", "relevancy", "tam", "gradient-input", "exhaustive"):
        with pytest.raises(mf.InputError, match="keep too little to run the model again"):
            step.heatmap(method)
    for method in ("attention", "random"):
        assert step.heatmap(method).shape == ex.layout.images[0].grid
    with pytest.raises(mf.InputError, match=r"method is one of logprob, attention, .* got 'gradcam'"):
        ex.heatmap(0, "gradcam")


def test_methods_say_whether_they_take_heads(shapes, picture):
    """One that takes them has another map for other heads, and one that does not has the same."""
    ex = shapes.explain(picture, "What color is the circle?", "red circle")
    for name in methods_without_detector():
        method, image = HEATMAP_METHODS.get(name), ex.layout.images[0]
        one, other = (method.attribution(ex, 0, image, heads) for heads in ([(3, 0)], [(0, 0)]))
        assert method.takes_heads != torch.equal(one, other), name


def test_methods_say_whether_they_give_every_position(shapes, picture):
    """One that does gives the same numbers for each image; the model then runs once for all images."""
    ex = shapes.explain([picture, picture.rotate(90)], "What color is the circle?", "red circle")
    for name in methods_without_detector():
        method = HEATMAP_METHODS.get(name)
        one, other = (method.attribution(ex, 1, image, 3) for image in ex.layout.images)
        assert method.every_position == (len(one) > len(ex.layout.images[0].positions)), name
        assert not method.every_position or torch.equal(one, other), name
        for number, image in enumerate(ex.layout.images):
            own = method.attribution(ex, 1, image, 3)
            own = own[image.positions] if method.every_position else own
            assert torch.equal(ex.attribution(1, name, 3, number), own.float()), name
    assert not torch.equal(ex.attribution(1, "random"), ex.attribution(1, "random", image=1))


@pytest.mark.parametrize("name", ["rollout", "relevancy", "gradient-input"])
def test_the_model_runs_once_for_all_images(shapes, picture, monkeypatch, name):
    ex = shapes.explain([picture] * 3, "What color is the circle?", "red circle")
    runs, run = [], Replay.hidden_states
    monkeypatch.setattr(Replay, "hidden_states", lambda *given: runs.append(1) or run(*given))
    first = [ex.heatmap(0, name, image=image) for image in range(3)]
    ex.verify(tokens=[0], method=name)
    assert len(runs) == 1
    first[0].zero_()
    assert ex.heatmap(0, name).any(), "what is given is the caller's own"
    ex.heatmap(1, name)
    ex.forget()
    ex.heatmap(0, name)
    assert len(runs) == 3
