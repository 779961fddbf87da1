"""Models whose layers lie on several devices (`device_map`): every number is that of the model on one.

The devices are those of `two_devices`. Two real cards were never used.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import families
import pytest
import split_cases
import tiny
import torch
from accelerate import dispatch_model
from torch.utils import backend_registration
from torch.utils._pytree import tree_map
from two_devices import placing

import mllm_fast as mf

MODELS = {
    "llava": lambda: tiny.llava(heads=4),
    "qwen3_vl": families.BUILD["qwen3_vl"],
    "gemma3": families.BUILD["gemma3"],
    "gemma3_short": families.BUILD["gemma3_short"],
}
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch has no such device"
)
GRADIENTS = ("relevancy", "gradient-input")
WITHOUT = tuple(method for method in split_cases.METHODS if method not in GRADIENTS)


def device_map(vlm: mf.VLM, first: str, second: str) -> dict[str, str]:
    """The earlier layers on one device, the later ones and the unembedding on the other."""
    decoder, count = vlm.text.findings.decoder, len(vlm.text.layers)
    found = {f"{decoder}.layers.{i}": first if i < count // 2 else second for i in range(count)}
    found |= {
        f"{decoder}.{name}": second if name == "norm" else first for name in ("embed_tokens", "norm", "rotary_emb")
    }
    for name, _ in vlm.model.named_modules():
        inside = any(name == one or name.startswith(f"{one}.") for one in found)
        holds = not name or any(one.startswith(f"{name}.") for one in found)
        if not (inside or holds):
            vision = first if first == "cpu" else second  # transformers' own code mixes devices otherwise
            found[name] = second if name == vlm.text.findings.head else vision
    return found


@pytest.fixture(scope="module", params=MODELS)
def whole(request) -> mf.VLM:
    model, processor = MODELS[request.param]()
    return mf.VLM(model.double(), processor, backend="torch")


@contextmanager
def over(whole: mf.VLM, first: str, second: str) -> Iterator[mf.VLM]:
    """The model over two devices."""
    places = device_map(whole, first, second)
    with placing():
        model = copy.deepcopy(whole.model)
        for name, place in places.items():
            model.get_submodule(name).to(place)
        model.hf_device_map = places
        # else accelerate would keep the weights of the CPU there, and compute on the card
        main = "cpu" if "cpu" in places.values() else None
        dispatch_model(model, places, main_device=main, force_hooks=True)
        vlm = mf.VLM(model, whole.processor, backend="torch")
        vars(vlm.text)["inference"] = torch.no_grad  # a `Placed` is no inference tensor
        yield vlm


@pytest.fixture
def spread(whole, request) -> Iterator[mf.VLM]:
    with over(whole, *request.param) as vlm:
        yield vlm


def assert_equal(name: str, whole: mf.VLM, spread: mf.VLM) -> None:
    run = split_cases.CASES[name]
    got = tree_map(lambda one: one.cpu() if isinstance(one, torch.Tensor) else one, split_cases.result(run, spread))
    assert split_cases.error(got, split_cases.result(run, whole)) < 1e-6


@pytest.mark.parametrize("spread", [("two:0", "two:1")], indirect=True, ids=["two cards"])
def test_every_number_is_that_of_one_device(whole, spread, monkeypatch):
    monkeypatch.setattr(split_cases, "METHODS", WITHOUT)  # torch's autograd knows one card of this kind
    for name in split_cases.CASES:
        assert_equal(name, whole, spread)


def test_maps_by_gradients_over_the_cpu_and_a_card():
    """In a process of its own: autograd counts the devices once, at the first gradient, and knows one card here."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(MODELS)


@pytest.mark.parametrize("spread", [("two:0", "two:1")], indirect=True, ids=["two cards"])
def test_contexts_go_through_files(whole, spread, tmp_path):
    path, question = tmp_path / "image.safetensors", "is the circle red ?"
    ctx = spread.compress(split_cases.IMAGE, keep=0.4, score="query")
    assert ctx.keys.device.type == "cpu"
    assert [one.device for one in ctx.questions.keys] == [one.o_proj.weight.device for one in spread.text.attention]
    ctx.save(path)
    wanted = ctx.ask(question, max_new_tokens=4).token_ids
    assert mf.Context.load(path, spread).ask(question, max_new_tokens=4).token_ids == wanted
    assert mf.Context.load(path, whole).ask(question, max_new_tokens=4).token_ids == wanted


@pytest.mark.parametrize("spread", [("two:0", "two:1")], indirect=True, ids=["two cards"])
def test_static_streams_are_refused(spread):
    with pytest.raises(mf.InputError, match=r"static.*several devices"):
        spread.stream(split_cases.IMAGE, "red ?", static=True)


if __name__ == "__main__":
    split_cases.METHODS = GRADIENTS
    for name, build in MODELS.items():
        made, reader = build()
        model_here = mf.VLM(made.double(), reader, backend="torch")
        with over(model_here, "cpu", "two:0") as elsewhere:
            assert_equal("maps", model_here, elsewhere)
        print(name)
