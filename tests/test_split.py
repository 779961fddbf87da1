"""Models that are split over processes: every number is that of the model in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import ranks
import tiny
import transformers
from packaging.version import Version

from mllm_fast.core.errors import InputError
from mllm_fast.core.split import kv_shares, shares

MODELS = {
    "llava": lambda: tiny.llava(heads=4),
    "internvl": families.BUILD["internvl_qwen3"],
    "qwen2_5_vl": tiny.qwen2_5_vl,
    "qwen3_vl": families.BUILD["qwen3_vl"],
    "gemma3": families.BUILD["gemma3"],
    "gemma3_short": families.BUILD["gemma3_short"],
}
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="this transformers divides no models by a config"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each model."""
    found = {name: tmp_path_factory.mktemp("models") / name for name in MODELS}
    for name, folder in found.items():
        for part in MODELS[name]():
            part.save_pretrained(folder)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def compared(request, folders) -> list[list[dict[str, Any]]]:
    """What each rank found of each model."""
    printed = ranks.finished(ranks.start(request.param, [ranks.HERE / "split_cases.py", *folders.values()]))
    return [[json.loads(line) for line in lines.splitlines()] for lines in printed]


@pytest.mark.parametrize("name", MODELS)
def test_every_number_is_that_of_the_whole_model(compared, name):
    """In float64; explanations are handed out in float32."""
    for found in compared:
        errors = next(one["errors"] for one in found if one["model"] == name)
        assert len(errors) > 15
        assert errors.pop("logits") < 1e-13
        assert {case: error for case, error in errors.items() if not error < 1e-6} == {}


@pytest.mark.parametrize("name", MODELS)
def test_each_rank_holds_its_part_alone(compared, name):
    """The words do not divide: the longest part has one more."""
    count = len(compared)
    for found in compared:
        divided, held, _ = next(one["held"] for one in found if one["model"] == name)
        words = 2 * 64  # a word of the embedding and one of the unembedding
        assert held <= divided / count + words


def test_shares():
    assert shares(29, 4) == (range(8), range(8, 16), range(16, 24), range(24, 29))
    assert kv_shares(8, 4, 2) == (range(2), range(2, 4))
    assert kv_shares(8, 2, 4) == (range(1), range(1), range(1, 2), range(1, 2))
    assert kv_shares(6, 2, 2) == (range(1), range(1, 2))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "count", "message"),
    [
        (6, 2, 4, "6 attention heads do not divide by 4 processes"),
        (12, 3, 2, "3 heads of keys and values and 2 processes"),
    ],
)
def test_heads_that_do_not_divide(heads, kv_heads, count, message):
    with pytest.raises(InputError, match=message):
        kv_shares(heads, kv_heads, count)
