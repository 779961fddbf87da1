"""What knockout attention refuses, by name, and which backend each op gets."""

from __future__ import annotations

import pytest
import torch
from mllm_fast.kernels import dispatch, knockout_attention, segment_table
from mllm_fast.kernels.dispatch import backend_report, choose
from mllm_fast.kernels.knockout_attention import SEGMENTS
from test_knockout_attention import EXTENSION, SETS, needs_extension


def ids(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


NO_RULES = torch.zeros(SEGMENTS, dtype=torch.int32)
BAD = [
    ({"query": torch.zeros(2, 5, 16)}, "query has four dimensions"),
    ({"value": torch.zeros(5, 16)}, "value has four dimensions"),
    ({"key": torch.zeros(1, 2, 9, 16, requires_grad=True)}, "key requires a gradient"),
    ({"query": torch.zeros(1, 4, 16, 3).mT}, r"query is not contiguous in its last dimension \(stride 3\)"),
    ({"key": torch.zeros(1, 2, 9, 16).double()}, "key is torch.float64, query torch.float32"),
    ({"value": torch.zeros(1, 2, 9, 16, device="meta")}, "value is on meta, query on cpu"),
    (
        {n: torch.zeros(1, 2, 9, 16, dtype=torch.int8) for n in ("query", "key", "value")},
        "query is float16, .* got torch",
    ),
    ({n: torch.zeros(1, 2, 9, 8) for n in ("query", "key", "value")}, "head size is 16 to 256, got 8"),
    ({n: torch.zeros(1, 2, 9, 257) for n in ("query", "key", "value")}, "head size is 16 to 256, got 257"),
    ({"key": torch.zeros(2, 2, 9, 16)}, r"key is \[1, Hkv, N, 16\].*got \[2, 2, 9, 16\]"),
    ({"key": torch.zeros(1, 2, 9, 32)}, r"key is \[1, Hkv, N, 16\].*got \[1, 2, 9, 32\]"),
    ({"value": torch.zeros(1, 2, 8, 16)}, r"value is \[1, 2, 9, 16\].*got \[1, 2, 8, 16\]"),
    ({n: torch.zeros(1, 3, 9, 16) for n in ("key", "value")}, "multiple of key's, got 4 and 3"),
    ({n: torch.zeros(1, 0, 9, 16) for n in ("key", "value")}, "multiple of key's, got 4 and 0"),
    ({n: torch.zeros(1, 2, 2, 16) for n in ("key", "value")}, "got 3 rows and 2 positions"),
    ({"segments": torch.zeros(1, 9, dtype=torch.uint8)}, "segments and table go together"),
    ({"table": NO_RULES}, "segments and table go together"),
    ({"segments": torch.zeros(1, 9), "table": NO_RULES}, r"segments is uint8 \[1, 9\], got torch.float32"),
    ({"segments": ids([[0] * 8]), "table": NO_RULES}, r"segments is uint8 \[1, 9\].*\[1, 8\]"),
    ({"segments": ids([[0] * 9] * 2), "table": NO_RULES}, r"segments is uint8 \[1, 9\].*\[2, 9\]"),
    ({"segments": ids([0] * 9), "table": NO_RULES}, r"segments is uint8 \[1, 9\].*\[9\]"),
    ({"segments": ids([[0] * 9]), "table": NO_RULES[:31]}, r"table is int32 \[32\].*\[31\]"),
    ({"segments": ids([[0] * 9]), "table": NO_RULES.long()}, r"table is int32 \[32\].*int64"),
    ({"segments": ids([[0] * 9]), "table": NO_RULES.to("meta")}, "table is on meta"),
    ({"start": torch.zeros(1)}, r"start is int32 \[1\], got torch.float32"),
    ({"start": torch.zeros(2, dtype=torch.int32)}, r"start is int32 \[1\].*\[2\]"),
    ({"mass": torch.ones(1, 9, dtype=torch.bool)}, r"mass is True, False or bool \[1, 3\].*\[1, 9\]"),
    ({"mass": torch.ones(1, 3)}, r"mass is True, False or bool \[1, 3\], got torch.float32"),
    ({"mass": 1}, r"mass is True, False or bool \[1, 3\], got 1"),
    ({"mass": None}, r"mass is True, False or bool \[1, 3\], got None"),
    ({"softcap": 0.0}, "softcap is a positive number or None, got 0.0"),
    ({"softcap": float("inf")}, "softcap is a positive number or None, got inf"),
    ({"sinks": torch.zeros(3)}, r"sinks is floating \[4\], got torch.float32 \[3\]"),
    ({"sinks": torch.zeros(4, dtype=torch.int64)}, r"sinks is floating \[4\], got torch.int64"),
    ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta, query on cpu"),
    ({"scale": 0.0}, "scale is a positive number, got 0.0"),
    ({"scale": -1.0}, "scale is a positive number, got -1.0"),
    ({"scale": float("nan")}, "scale is a positive number, got nan"),
    ({"scale": float("inf")}, "scale is a positive number, got inf"),
    ({"backend": "cuda"}, "backend is one of auto, triton, cpu, torch, got 'cuda'"),
    ({"backend": "triton"}, "backend 'triton' cannot be used: the tensors are on cpu"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments_are_named(change, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    good = {
        "query": torch.zeros(1, 4, 3, 16),
        "key": torch.zeros(1, 2, 9, 16),
        "value": torch.zeros(1, 2, 9, 16),
    }
    knockout_attention(**good)
    with pytest.raises(ValueError, match=message):
        knockout_attention(**(good | change))


@needs_extension
@pytest.mark.parametrize("rows", [1, 40])
def test_ids_above_31_are_refused(rows):
    """On the CPU, where they can be read without waiting."""
    segments = torch.zeros(1, 40, dtype=torch.uint8)
    segments[0, 7] = 32
    operand = torch.zeros(1, 2, 40, 16)
    with pytest.raises(ValueError, match="ids 0 to 31, got 32"):
        knockout_attention(operand[:, :, :rows], operand, operand, segments=segments, table=NO_RULES, backend="cpu")


@needs_extension
def test_explicit_backend_is_never_replaced():
    operand = torch.zeros(1, 2, 9, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="'cpu' cannot be used: it takes float32, bfloat16 operands, got float64"):
        knockout_attention(operand, operand, operand, backend="cpu")


def test_segment_table():
    """Bit s of entry t: rows of t do not see keys of s. Bit 31 is the sign."""
    table = segment_table([(0, 5), (31, 5), (31, 0), (31, 31), (0, 5)])
    assert table.dtype == torch.int32
    assert table[5] == 1 - 2**31
    assert table[0] == table[31] == -(2**31)
    assert table.count_nonzero() == 3
    assert segment_table([]).tolist() == [0] * 32
    for rule in ((32, 0), (0, 32), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=rf"segment ids are 0 .. 31, got the rule \({rule[0]}, {rule[1]}\)"):
            segment_table([rule])


@pytest.fixture
def forgetful():
    """Nothing that `choose` found in a test, or before it, is kept."""
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_a_gpu_machine_without_triton_is_told_so(monkeypatch):
    """It is not served by plain torch unless that is asked for."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "triton is not installed (no module)")
    for op in ("knockout_attention", "logprob_increase", "topk_compaction", "weighted_values"):
        with pytest.raises(ValueError, match=f"{op} on cuda:0: triton is not installed.*backend='torch'"):
            choose(gpu, torch.bfloat16, op=op)
        with pytest.raises(ValueError, match=r"'triton' cannot be used: triton is not installed.*use 'torch'"):
            choose(gpu, torch.bfloat16, "triton", op=op)
        assert choose(gpu, torch.bfloat16, "torch", op=op) == "torch"
    assert choose(gpu, torch.float64, op="knockout_attention") == "torch"


@pytest.mark.usefixtures("forgetful")
def test_choices(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = lambda *a, op="knockout_attention": choose(*a, op=op)  # noqa: E731
    assert rule(gpu, torch.float16) == "triton"
    assert rule(gpu, torch.float32, "triton") == "triton"
    assert rule(cpu, torch.float16) == "torch"
    assert rule(cpu, torch.float32, op="topk_compaction") == "torch"
    with pytest.raises(ValueError, match="'cpu' cannot be used: the tensors are on cuda"):
        rule(gpu, torch.float32, "cpu")
    with pytest.raises(ValueError, match="no kernel of that kind"):
        rule(cpu, torch.float32, "cpu", op="topk_compaction")
    choose.cache_clear()
    monkeypatch.setattr(dispatch, "cpu_extension", lambda: (None, "the C++ extension is not built"))
    assert rule(cpu, torch.float32) == "torch"
    with pytest.raises(ValueError, match="not built"):
        rule(cpu, torch.float32, "cpu")


def test_report_says_what_each_op_uses(monkeypatch):
    report = backend_report()
    ops = {"knockout_attention", "logprob_increase", "topk_compaction", "weighted_values"}
    assert set(report) == {*ops, "skinny_linear", "decoder_layers"}
    if EXTENSION and not torch.cuda.is_available():
        assert report["knockout_attention"].startswith(f"CPU: C++ for float32, bfloat16, {SETS[0]} (")
        assert "1 to 64 rows in float32" in report["skinny_linear"] or "3 to 64" in report["skinny_linear"]
    assert "plain torch (no C++ kernel" in report["topk_compaction"]
    monkeypatch.setattr(dispatch, "cpu_extension", lambda: (None, "the C++ extension is not built"))
    assert "CPU: plain torch (the C++ extension is not built)" in backend_report()["knockout_attention"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "")
    gpu = "GPU (Some GPU, sm_90): Triton for float16, bfloat16, float32; CPU"
    assert all(backend_report()[op].startswith(gpu) for op in ops)
    linear = backend_report()["skinny_linear"]
    assert linear.startswith("GPU (Some GPU, sm_90): torch's own matrix products; CPU: plain torch")
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "triton is not installed")
    assert all(backend_report()[op].startswith("GPU: refused, triton is not installed; CPU") for op in ops)
    assert backend_report()["skinny_linear"] == linear
