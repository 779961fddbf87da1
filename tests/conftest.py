"""Fixtures: the tiny models, built once a session, and pictures."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import tiny
import torch
from hypothesis import settings
from PIL import Image

import mllm_fast as mf
from mllm_fast import cli

# the same examples each time: other ones are drawn by `pytest --hypothesis-profile random`
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("fixed")


# a config file and a model of whoever runs the tests are not theirs; the processes that tests start inherit this
os.environ["MLLM_FAST_CONFIG"] = os.devnull
os.environ.pop("MLLM_FAST_MODEL", None)
os.environ["MLLM_FAST_TUNING"] = "off"  # the same paths on every run


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def built():
    """Family -> (model in float64, processor), each built once."""
    cache = {}

    def build(name: str):
        if name not in cache:
            model, processor = tiny.BUILD[name]()
            cache[name] = model.double(), processor
        return cache[name]

    return build


@pytest.fixture
def vlm(family, built):
    return mf.VLM(*built(family))


@pytest.fixture(scope="session")
def shapes():
    return mf.VLM.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="session")
def picture():
    """90 x 40 pixels: InternVL cuts it into two tiles and a thumbnail."""
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 90, 3), dtype=np.uint8))


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    # a machine with a GPU must show what all others show
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mllm-fast", *map(str, arguments)])
        capfd.readouterr()  # what the test's own preparations printed
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call
