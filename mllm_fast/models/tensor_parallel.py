"""Models that are split over processes by transformers' tensor parallelism.

transformers divides the projections of attention and MLP by its plan for the model. Added here are plans of models that
have none for their layers, and keys and values of fewer heads than processes: each process then has the rows of the
projections that its query heads read.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.split import Split, control_group, is_sharded, kv_shares, shares

TIMEOUT = 25.0  # seconds that a process waits for the others inside a call
_UNKNOWN = "load it by VLM.from_pretrained(..., tp='auto'), without quantised weights"
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")


def join_ranks(tp: int | str, device: torch.device) -> int:
    """Join the process group that torchrun describes, and return the number of its ranks.

    The group is left when the interpreter ends; one that the caller joined before is the caller's to leave.

    Args:
        tp: "auto", or the number of processes that the caller expects.
        device: The device on which this process computes.

    Raises:
        InputError: This process was not started as one of several, or there are not `tp` of them.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise InputError(
            "tp divides a model between processes, of which this is the only one: start the program with"
            " torchrun --nproc-per-node N, or a command with --tp N"
        )
    ranks = int(os.environ["WORLD_SIZE"])
    if tp != "auto" and (isinstance(tp, bool) or tp != ranks):
        raise InputError(f"tp is 'auto' or the number of processes, {ranks}; got {tp!r}")
    if device.type == "cpu" and torch.cuda.is_available():
        raise InputError("tp on the CPU needs CUDA_VISIBLE_DEVICES='', as transformers divides models on the GPUs else")
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device.type == "cuda" and place >= count:
        raise InputError(f"tp takes a GPU a process, and there are {count} for process {place + 1} on this machine")
    if not dist.is_initialized():
        cuda = device.type == "cuda"
        if cuda:
            device = torch.device("cuda", place)
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(seconds=TIMEOUT),
            device_id=device if cuda else None,
        )
        atexit.register(_leave_ranks)
    return ranks


def _leave_ranks() -> None:
    """Leave the group while the interpreter is whole: torch's threads abort the process now and then else."""
    if dist.is_initialized():
        dist.destroy_process_group()


def distribution(config: Any, ranks: int, quantised: bool = False) -> Any:
    """Return transformers' `DistributedConfig` that divides a model between ranks.

    Args:
        config: The model's configuration.
        ranks: The number of processes.
        quantised: Whether the caller asks for quantised weights.

    Raises:
        InputError: The installed transformers has none, the model's heads do not divide by the processes, or there are
            fewer words than processes.
    """
    from transformers import distributed

    made = getattr(distributed, "DistributedConfig", None)
    if "tp_plan" not in getattr(made, "__dataclass_fields__", {}):
        raise InputError("tensor parallelism needs a newer transformers: pip install -U transformers")
    text = config.get_text_config()
    if quantised or getattr(config, "quantization_config", None):
        raise InputError(
            "a quantised model is not divided between processes: load it with device_map over several GPUs"
        )
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    kv_shares(heads, kv_heads, ranks)
    if not shares(int(text.vocab_size), ranks)[-1]:
        raise InputError(f"{text.vocab_size} words do not give each of {ranks} processes some: take fewer processes")
    return made(tp_plan=_plan(config, kv_heads % ranks != 0) or "auto")  # type: ignore[misc]


def _plan(config: Any, whole_keys: bool) -> dict[str, str]:
    """Return the rules that a model's own plan lacks.

    Args:
        config: The model's configuration.
        whole_keys: Whether the projections of keys and values are loaded whole on every process.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    names = {module: name for name, module in model.named_modules()}
    decoder = names[model.get_decoder()]
    linear = {
        re.sub(r"\.\d+\.", ".*.", name): name
        for module, name in names.items()
        if isinstance(module, nn.Linear) and re.match(re.escape(decoder) + r"\.layers\.\d+\.", name)
    }
    own, added = model.tp_plan or {}, {}
    for rule in linear:
        last = rule.rpartition(".")[2]
        if whole_keys and last in ("k_proj", "v_proj"):
            added[rule] = "replicate"
        elif rule not in own and not any(rule.startswith(f"{name}.") for name in own):
            added |= {rule: "colwise"} if last in _COLUMNS else {rule: "rowwise"} if last in _ROWS else {}
    return added


def keep_own_keys(model: Any, ranks: int) -> None:
    """Leave each process the rows of the projections of keys and values that its query heads read.

    It is for models that have fewer heads of keys and values than there are processes.
    """
    text = model.config.get_text_config()
    heads, kv_heads = int(text.num_attention_heads), int(getattr(text, "num_key_value_heads", None) or 0)
    if not kv_heads or kv_heads % ranks == 0:
        return
    mine = kv_shares(heads, kv_heads, ranks)[dist.get_rank()]
    for module in model.get_decoder().modules():
        if not all(isinstance(getattr(module, name, None), nn.Linear) for name in ("k_proj", "v_proj")):
            continue
        for name in ("k_proj", "v_proj"):
            _keep_rows(getattr(module, name), mine, kv_heads)
        module.num_key_value_groups = heads // ranks // len(mine)  # type: ignore[assignment]


@torch.no_grad()
def _keep_rows(layer: nn.Linear, heads: range, of: int) -> None:
    """Leave a projection, which is whole on every process, the rows of some heads."""
    width = layer.out_features // of
    for name in ("weight", "bias"):
        whole = getattr(layer, name)
        if whole is not None:
            kept = nn.Parameter(whole[heads.start * width : heads.stop * width].clone(), False)
            kept.held_rows = heads.start * width, len(whole)  # type: ignore[attr-defined]
            setattr(layer, name, kept)
    layer.out_features = len(heads) * width
    forward = layer.forward
    layer.forward = lambda given: forward(_Summed.apply(given))  # type: ignore[method-assign, assignment]


class _Summed(torch.autograd.Function):
    """Passes a tensor on, and sums its gradient over all processes, each of which uses it for its own heads."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> Tensor:
        total = change.contiguous().clone()
        dist.all_reduce(total)
        return total


def split_of(outputs: Sequence[Any], head: Any, heads: int, kv_heads: int, every: int | None = None) -> Split | None:
    """Return how a text model is split, or None if this process holds all of it.

    Args:
        outputs: The output projection of each attention.
        head: The unembedding.
        heads: How many query heads this process holds.
        kv_heads: How many heads of keys and values the whole model has.
        every: How many query heads the whole model has, if that is known.

    Raises:
        InputError: It is divided otherwise than by the heads of all layers and by words.
    """
    weights = [getattr(one, "weight", None) for one in outputs]
    divided = [one for one in weights if is_sharded(one)]
    words = getattr(head, "weight", None)
    if not divided and not is_sharded(words):
        return None
    from torch.distributed.tensor import Replicate, Shard

    named: Any = divided[0] if divided else words
    mesh = named.device_mesh
    by_heads = bool(divided) and named.placements != (Replicate(),)
    alike = all(one.placements == (Shard(1),) and one.device_mesh == mesh for one in divided)  # type: ignore[union-attr]
    if mesh.ndim != 1 or (by_heads and not (alike and len(divided) == len(weights))):
        raise InputError(f"the layers of this model are not divided by their heads alone: {_UNKNOWN}")
    whole = not is_sharded(words) or words.placements == (Replicate(),)  # type: ignore[union-attr]
    if not whole and words.placements != (Shard(0),):  # type: ignore[union-attr]
        raise InputError(
            "the unembedding is not divided by words: load the model by VLM.from_pretrained(..., tp='auto')"
        )
    ranks, group, vocabulary = mesh.size(), mesh.get_group(), len(words)  # type: ignore[arg-type]
    total = heads * ranks if by_heads else heads
    if every is not None and every != total:
        raise InputError(f"this model has {every} attention heads, and its processes show {total}: {_UNKNOWN}")
    return Split(
        group=group,
        control=control_group(group),
        rank=mesh.get_local_rank(),
        heads=shares(total, ranks) if by_heads else (range(total),) * ranks,
        kv_heads=kv_shares(total, kv_heads, ranks) if by_heads else (range(kv_heads),) * ranks,
        words=(range(vocabulary),) * ranks if whole else shares(vocabulary, ranks),
    )
