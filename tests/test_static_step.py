"""The static decoding step: what a stream gives, over tensors that stay, without waiting for the device."""

from __future__ import annotations

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.runtime import decoding
from mllm_fast.runtime.cuda_graph import Replayed
from mllm_fast.runtime.static_step import StaticStep

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUESTION = "what color is the circle ?"
PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 90, 3), dtype=np.uint8))
COUNT = 6
STATES = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "mllama")  # layers that keep a state of their own
SHARED = ("gemma4_shared",)
UNEVEN = ("gemma4",)  # heads of several sizes: not explained
EXPERTS = ("qwen3_vl_moe", "glm4v_moe", "kimi_k25", "internvl_gpt_oss")
NAMES = [name for name in (*tiny.FAMILIES, *families.BUILD) if name not in (*STATES, *SHARED)]

WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "_unique2", "unique_consecutive", "unique_dim", "bincount", "histc", "allclose", "_assert_async", "lift_fresh",
    "lift_fresh_copy",
}  # fmt: skip
READS = {
    "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "item", "__array__", "cpu", "cuda",
    "pin_memory", "__contains__",
}  # fmt: skip


def build(name):
    model, processor = families.build(name) if name in families.BUILD else getattr(tiny, name)()
    return model.eval(), processor


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait for the device or have a shape that depends on data, and notes all others.

    Numbers are noted too: one that was a position when a graph was captured would stay what it was.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, leaves = func.overloadpacket.__name__, _pytree.tree_leaves((args, kwargs or {}))
        given = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in given)
        counted = name == "repeat_interleave" and isinstance(args[-1], Tensor)
        if name in WAITS or masked or counted:
            raise AssertionError(f"{func} waits for the device, or its shape depends on data")
        shapes = [(tuple(one.shape), one.stride(), one.dtype) if isinstance(one, Tensor) else one for one in leaves]
        self.calls.append((str(func), *shapes))
        return func(*args, **(kwargs or {}))


class NoReads(TorchFunctionMode):
    """Refuses methods that read a tensor without an operation: `tolist` of a tensor on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS and args and isinstance(args[0], Tensor):
            raise AssertionError(f"Tensor.{name}: the host reads a tensor")
        return func(*args, **(kwargs or {}))


def lying(step):
    """Where the tensors of a step lie: those that are written, and those that are read."""
    found = {name: one for name, one in vars(step).items() if type(one) is Tensor}
    found |= {f"{name}.{i}": one for name in ("keys", "values") for i, one in enumerate(getattr(step, name))}
    fresh = ("_seen", "_segments", "_logits")  # which a graph writes where it wrote before
    return {name: (one.data_ptr(), one.shape, one.stride()) for name, one in found.items() if name not in fresh}


@pytest.fixture
def contract(monkeypatch):
    """Runs every step under both modes, and holds the operations of the later ones equal."""
    calls: dict[Replayed, list[list[tuple]]] = {}
    steps: list[StaticStep] = []
    begin, prepared = StaticStep.__init__, Replayed.__init__

    def started(self, *given, **named):
        begin(self, *given, **named)
        steps.append(self)

    def watched(self, function, moving, attached):
        def run():
            with NoReads(), NoWaiting() as seen:
                found = function()
            calls.setdefault(self, []).append(seen.calls)
            return found

        prepared(self, run, moving, attached)

    monkeypatch.setattr(StaticStep, "__init__", started)
    monkeypatch.setattr(Replayed, "__init__", watched)
    return calls, steps


def told(vlm, changes=(), **options):
    """Tokens, log-probabilities, head scores, position scores and maps of a stream."""
    found, explain = [], options.get("explain", True)
    stream = vlm.stream(PICTURE, QUESTION, **{"explain": True, "max_new_tokens": COUNT, **options})
    for index in range(COUNT):
        if index in dict(changes):
            stream.knockout = dict(changes)[index]
        step = next(stream, None)
        if step is None:
            break
        found.append((step.token_id, step.log_prob))
        if explain:
            found[-1] += step.head_scores, step.position_scores(), step.heatmap(), step.position_scores([(0, 1)])
    return found


def assert_same(found, wanted, **allowed):
    assert [one[0] for one in found] == [one[0] for one in wanted]
    for mine, right in zip(found, wanted, strict=True):
        assert mine[1] == pytest.approx(right[1], abs=1e-5)
        for one, other in zip(mine[2:], right[2:], strict=True):
            # heads of equal scores may come in another order
            torch.testing.assert_close(one.sum(0), other.sum(0), **allowed)


def own_words(vlm):
    """Options under which a model of random weights says no placeholder of an image, nor ends."""
    return {"suppress_tokens": [vlm.prompts.image_tokens.image], "min_new_tokens": COUNT}


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name, contract):
    """In float64, on plain torch, where every operation is seen: the same words, scores and maps."""
    calls, steps = contract
    model, processor = build(name)
    if name in EXPERTS:
        model.set_experts_implementation("batched_mm")  # the eager one waits to know which experts are called
    vlm = mf.VLM(model.double(), processor, backend="torch")
    explain = name not in UNEVEN
    options = {"explain": explain, **own_words(vlm)}
    changes = [(2, ("image->generated", mf.Knockout("query", "generated", layers=[0]))), (4, None)]
    found = told(vlm, changes, static=True, **options)
    assert len(found) > 3
    assert_same(found, told(vlm, changes, **options), rtol=1e-5, atol=1e-7)
    assert calls
    for each in calls.values():
        assert len(each) in (len(found) - 1, len(found))  # a last one may end the answer
        assert all(one == each[1] for one in each[2:])  # the first may make what later ones find
    assert len(steps) == 1
    assert not str(vlm.text.config._attn_implementation).startswith("mllm_fast")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_kernels_of_this_machine(name, contract):
    """In float32 the steps lie where they lay, and sampling draws what it draws without them."""
    _, steps = contract
    model, processor = build(name)
    vlm = mf.VLM(model.float(), processor)
    whole = {"suppress_tokens": None, "max_new_tokens": COUNT}
    for options in ({}, {"knockout": "image->generated"}, {"do_sample": True, "temperature": 0.7, "top_k": 5}):
        runs = []
        for static in (True, False):
            torch.manual_seed(3)
            runs.append(told(vlm, static=static, **whole, **options))
        assert_same(*runs, rtol=1e-3, atol=1e-4)
    places = []
    stream = vlm.stream(PICTURE, QUESTION, explain=True, static=True, **own_words(vlm), max_new_tokens=COUNT)
    for index, _ in enumerate(stream):
        if index:
            places.append(lying(steps[-1]))
    assert len(places) == COUNT - 1
    for one in places[1:]:
        assert one == places[0]


def test_the_modes_see_what_they_are_for():
    row = torch.arange(3)
    for function in (lambda: row[row > 1], lambda: row.tolist(), lambda: int(row[0]), lambda: torch.tensor([1.0])):
        with pytest.raises(AssertionError), NoReads(), NoWaiting():
            function()


def test_steps_can_be_looked_at_later():
    """What a step has not computed comes from its trace, whose rows later steps do not overwrite."""
    vlm = mf.VLM(*build("llava"))
    options = own_words(vlm) | {"max_new_tokens": COUNT, "explain": True}
    found = list(vlm.stream(PICTURE, QUESTION, static=True, **options))
    wanted = list(vlm.stream(PICTURE, QUESTION, **options))
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.attention(), right.attention(), rtol=1e-4, atol=1e-5)
        mine.explanation.forget()
        torch.testing.assert_close(mine.head_scores, right.head_scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.position_scores("all"), right.position_scores("all"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["frozen", "own"])
def test_both_norms(norm):
    model, processor = build("llava")
    vlm = mf.VLM(model.double(), processor)
    options = own_words(vlm) | {"final_norm": norm}
    assert_same(told(vlm, static=True, **options), told(vlm, **options), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*STATES, *SHARED])
def test_layers_of_their_own_are_refused(name):
    vlm = mf.VLM(*build(name))
    with pytest.raises(InputError, match="static=True"):
        vlm.stream(PICTURE, QUESTION, static=True)


def test_what_is_refused_by_name(monkeypatch):
    vlm = mf.VLM(*build("llava"))
    with pytest.raises(InputError, match="static=True takes no attention_share"):
        vlm.stream(PICTURE, QUESTION, static=True, attention_share=True)
    uneven = mf.VLM(*build("gemma4"))
    with pytest.raises(InputError, match="heads of one size"):
        uneven.stream(PICTURE, QUESTION, static=True, explain=True)
    made = StaticStep
    monkeypatch.setattr(decoding, "StaticStep", lambda *given, room, **named: made(*given, room=room - 3, **named))
    stream = vlm.stream(PICTURE, QUESTION, static=True, **own_words(vlm), max_new_tokens=COUNT)
    with pytest.raises(InputError, match="and all are taken"):
        list(stream)
    assert not str(vlm.text.config._attn_implementation).startswith("mllm_fast")
