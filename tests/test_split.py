"""Models that are split over processes: every number is that of the model in one process."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import families
import pytest
import ranks
import split_cases
import tiny
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from sweep import also
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mllm_fast as mf
from mllm_fast.context.file_format import read
from mllm_fast.core.errors import InputError
from mllm_fast.core.files import TEMPORARY
from mllm_fast.core.split import Placed, kv_shares, shares
from mllm_fast.models.fingerprint import _held_samples
from mllm_fast.models.loading import load_pretrained
from mllm_fast.models.tensor_parallel import distribution, split_of

MODELS = {
    "llava": lambda: tiny.llava(heads=4),
    "internvl": families.BUILD["internvl_qwen3"],
    "qwen2_5_vl": tiny.qwen2_5_vl,
    "qwen3_vl": families.BUILD["qwen3_vl"],
    "gemma3": families.BUILD["gemma3"],
    "gemma3_short": families.BUILD["gemma3_short"],
}
# of four processes, the first has as many heads of keys and values, the second has two
COMPARED = {2: tuple(MODELS), 4: ("llava", "qwen2_5_vl", *also("internvl", "qwen3_vl", "gemma3"))}
each_model = pytest.mark.parametrize(
    ("compared", "name"),
    [(count, name) for count, names in COMPARED.items() for name in names if name != "gemma3_short"],
    indirect=["compared"],
    scope="module",  # all of a number of processes follow each other
)
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


@pytest.fixture(scope="module")
def compared(request, folders) -> list[list[dict[str, Any]]]:
    """What each rank found of each model."""
    models = [folders[name] for name in COMPARED[request.param]]
    with ranks.running(request.param, [ranks.HERE / "split_cases.py", *models]) as processes:
        printed = ranks.finished(processes)
    return [[json.loads(line) for line in lines.splitlines()] for lines in printed]


@each_model
def test_every_number_is_that_of_the_whole_model(compared, name):
    """In float64; explanations are handed out in float32."""
    for found in compared:
        assert all(next(one["alike"] for one in found if one["model"] == name).values())
    errors = next(one["errors"] for one in compared[0] if one["model"] == name)
    assert len(errors) > 15
    assert errors.pop("logits") < 1e-13
    assert {case: error for case, error in errors.items() if not error < 1e-6} == {}


@each_model
def test_each_rank_holds_its_part_alone(compared, name):
    """The words do not divide: the longest part has one more."""
    count = len(compared)
    for found in compared:
        divided, held, _ = next(one["held"] for one in found if one["model"] == name)
        words = 2 * 64  # a word of the embedding and one of the unembedding
        assert held <= divided / count + words


@each_model
def test_what_a_token_sends(compared, name):
    """Head scores: one gather of the writes of this rank's heads. Position scores: one exchange of what heads write."""
    for found in compared:
        one = next(one for one in found if one["model"] == name)
        for kind, calls in one["traffic"].items():
            sizes = sorted(size for _, size in calls)
            assert sum(sizes[:-1]) < 64 * 1024
            assert [call for call, size in calls if size == sizes[-1]] == ["all_gather"]
            if kind == "heads":
                assert sizes[-1] == one["write"]


@pytest.mark.parametrize("compared", [2], indirect=True)
def test_a_window_that_is_shorter_than_the_prompt(compared):
    errors = next(one["errors"] for one in compared[0] if one["model"] == "gemma3_short")
    assert {case: error for case, error in errors.items() if not error < 1e-6} == {}


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


@pytest.mark.parametrize(("what", "victim"), [("stream", 0), ("compress", 1)])
def test_a_rank_that_is_killed_ends_the_others(folders, tmp_path, what, victim):
    """At once, with an error that says so, and without half a file."""
    with ranks.running(2, [ranks.HERE / "split_endless.py", folders["llava"], what, tmp_path]) as processes:
        for _ in range(3):
            assert processes[0].stdout.readline() == "round\n"
        time.sleep(0.05)
        processes[victim].kill()
        other = processes[1 - victim]
        _, errors = other.communicate(timeout=30)
    assert other.returncode > 0
    assert "closed by peer" in errors or "Connection reset" in errors or "Broken pipe" in errors
    saved = list(tmp_path.iterdir())
    if what == "compress":
        assert (tmp_path / "image.safetensors") in saved
        assert read(tmp_path / "image.safetensors")
    if victim:  # who is killed cannot remove what it has begun
        assert [one for one in saved if one.name.startswith(TEMPORARY)] == []


def test_a_rank_that_stands_still_ends_the_others(folders, tmp_path):
    """Inside a call they wait for the time that is stated, which the program sets to five seconds."""
    with ranks.running(2, [ranks.HERE / "split_endless.py", folders["llava"], "stream", tmp_path]) as processes:
        assert processes[0].stdout.readline() == "round\n"
        time.sleep(0.3)
        processes[1].send_signal(signal.SIGSTOP)
        _, errors = processes[0].communicate(timeout=30)
    assert processes[0].returncode > 0
    assert "Timed out" in errors or "timed out" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_a_model_that_does_not_fit_one_process(tmp_path, monkeypatch):
    """Weights of 196 MiB in float32, from a file of 98 MiB that counts while it is mapped, and a limit of 260 MiB."""
    model, processor = tiny.llava(heads=4, layers=3, width=1024)
    assert sum(weight.nbytes for weight in model.parameters()) > 196 << 20
    for part in (model.bfloat16(), processor):
        part.save_pretrained(tmp_path)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    small = ["sh", "-c", 'ulimit -s 512; exec "$0" "$@"']  # the stacks of the libraries' threads count as well
    program = [ranks.HERE / "split_large.py", tmp_path, 260]
    with ranks.running(1, [*program, "alone"], small) as (alone,):
        printed, _ = alone.communicate(timeout=300)
    assert alone.returncode == 1
    assert "memory" in json.loads(printed)["error"]
    with ranks.running(2, program, small) as processes:
        printed = ranks.finished(processes)
    whole = mf.VLM.from_pretrained(tmp_path, device="cpu", dtype="float32")
    wanted = whole.explain(split_cases.IMAGE, split_cases.QUESTION, "red").head_scores
    for found in printed:
        torch.testing.assert_close(torch.tensor(json.loads(found)["scores"]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_a_group_is_left_when_the_interpreter_ends(tmp_path, own):
    """Before torch's threads meet an interpreter that is no more; the caller's group is left alone."""
    program = tmp_path / "leaves.py"
    lines = [
        "import atexit, torch, torch.distributed as dist",
        "from mllm_fast.models.tensor_parallel import join_ranks",
        "atexit.register(lambda: print(dist.is_initialized() and (dist.destroy_process_group() or True)))",
        "" if own else "dist.init_process_group('gloo')",
        "print(join_ranks('auto', torch.device('cpu')))",
    ]
    program.write_text("\n".join(lines))
    with ranks.running(2, [program]) as processes:
        assert ranks.finished(processes) == [f"2\n{not own}\n"] * 2


def test_a_model_is_divided_by_several_processes_only(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        InputError, match=r"tp divides a model between processes, of which this is the only one.*torchrun"
    ):
        mf.VLM.from_pretrained("shapes", tp="auto")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="tp is 'auto' or the number of processes, 2; got 3"):
        mf.VLM.from_pretrained("shapes", device="cpu", tp=3)
    with pytest.raises(InputError, match="give one of them"):
        mf.VLM.from_pretrained("shapes", device="auto", tp=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "a quantised model is not divided between processes"),
        ({"vocab_size": 5}, "5 words do not give each of 4 processes some"),
        ({"num_attention_heads": 6}, "6 attention heads do not divide by 4 processes"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_it_is_loaded(change, message):
    config = tiny.llava(heads=4)[0].config
    for name, value in change.items():
        setattr(config if name == "quantization_config" else config.text_config, name, value)
    with pytest.raises(InputError, match=message):
        distribution(config, 4)


def test_quantisation_that_is_asked_for_is_refused():
    with pytest.raises(InputError, match="a quantised model is not divided"):
        distribution(tiny.llava(heads=4)[0].config, 4, quantised=True)


def test_adapters_are_merged_first(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="a model with adapters is not divided"):
        load_pretrained(str(tmp_path), torch.device("cpu"), torch.float32, ranks=2)


def test_other_divisions_are_refused(tmp_path):
    """What another library's sharding leaves on this process would give wrong numbers."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        output, head = nn.Linear(8, 8), nn.Linear(8, 30)
        output.weight = nn.Parameter(distribute_tensor(output.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(InputError, match=r"not divided by their heads alone"):
            split_of([output], head, 4, 4)
        head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(1)]))
        with pytest.raises(InputError, match=r"the unembedding is not divided by words"):
            split_of([nn.Linear(8, 8)], head, 4, 4)
        head.weight = nn.Parameter(distribute_tensor(head.weight.full_tensor().detach(), mesh, [Shard(0)]))
        assert split_of([nn.Linear(8, 8)], head, 4, 4, 4).heads == (range(4),)
        with pytest.raises(InputError, match="this model has 8 attention heads, and its processes show 4"):
            split_of([nn.Linear(8, 8)], head, 4, 4, 8)  # heads of weights that do not say how they are divided
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_hashed_values_of_a_divided_weight(dim, blocks):
    """Every value comes from the rank that has it, also where two projections lie in one tensor."""
    whole = torch.arange(1.0, 1 + 12 * 20 * 44).reshape(12, 20, 44)
    size, count = whole.shape[dim] // blocks, whole.numel()
    total = torch.zeros(0)
    for some in shares(size, 3):
        rows = [block * size + row for block in range(blocks) for row in some]
        held = whole.index_select(dim, torch.tensor(rows))
        part = _held_samples(held, Placed(dim, some.start, tuple(whole.shape), blocks))
        total = part if not len(total) else total + part
    assert torch.equal(total, whole.reshape(-1)[:: max(1, count // 4096)])
