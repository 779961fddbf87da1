from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import served
from kit import Beside
from PIL import Image
from served import KEY, OTHER

from mllm_fast.core.assets import SAMPLE


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "keys").write_text(f"{KEY}\n{OTHER}\n")
    made = served.Server("--api-keys", folder / "keys", "--store", folder / "store", cwd=folder)
    yield made
    assert made.process.poll() is None, "".join(made.raw)
    assert not any('"status": 500' in line or "Traceback" in line for line in made.raw)
    made.stop()


@pytest.fixture(scope="module")
def url():
    return served.data_url(Image.open(SAMPLE).convert("RGB"))


@pytest.fixture(scope="package")
def twin(tmp_path_factory):
    """A server that nobody attacks."""
    folder = tmp_path_factory.mktemp("in peace")
    (folder / "keys").write_text(f"{KEY}\n")
    made = served.Server("--api-keys", folder / "keys", cwd=folder)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def beside(server, twin, url):
    return Beside(server, twin, url)
