"""Models that are split over processes are refused by name: a process alone would give wrong numbers."""

from __future__ import annotations

import pytest
import tiny
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mllm_fast as mf
from mllm_fast.core.errors import InputError


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_split_model_is_refused(mesh):
    model, processor = tiny.llava()
    assert mf.VLM(model.eval(), processor)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(InputError, match=r"split over 1 processes \(tensor parallelism\).*load it whole"):
        mf.VLM(model, processor)
