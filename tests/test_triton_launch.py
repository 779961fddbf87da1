"""A launch is inspected by Triton once, and then goes to the compiled kernel with all arguments in their places."""

from __future__ import annotations

import pytest
from mllm_fast.kernels import triton_launch
from mllm_fast.kernels.triton_launch import Launch, remembered

GRID = (4, 2, 1)


class Kernel:
    """As Triton's: fn[grid](...) compiles, launches, and gives the compiled kernel, launched in the same way."""

    def __init__(self, compiles: bool):
        self.log: list[tuple] = []
        self.compiles = compiles

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.log.append(("inspected", grid, arguments, options))
            return Compiled(self.log) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("again", grid, arguments))


@pytest.mark.parametrize("compiles", [True, False])
def test_inspected_once(compiles):
    kernel = Kernel(compiles)
    launch = Launch(kernel, GRID, {"FLAG": True, "BLOCK": 64}, {"num_warps": 4})
    for i in range(3):
        launch("tensor", i)
    first, *others = kernel.log
    assert first == ("inspected", GRID, ("tensor", 0), {"FLAG": True, "BLOCK": 64, "num_warps": 4})
    for i, other in enumerate(others, 1):
        if compiles:
            assert other == ("again", GRID, ("tensor", i, True, 64))
        else:  # Triton's interpreter compiles nothing
            assert other == ("inspected", GRID, ("tensor", i), first[3])


def test_constants_are_the_kernels_last_parameters_in_order():
    """The compiled kernel takes them by place."""
    pytest.importorskip("triton")
    import torch
    from mllm_fast.kernels.knockout_attention import triton_kernel

    q, k = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 300, 64)
    plan = triton_kernel._plan(q, k, k, None, None, True, True, 2.0, torch.zeros(4))
    assert plan.splits > 1
    for launch in (plan.attend, plan.combine):
        names = [p.name for p in launch.fn.params]
        assert names[-len(launch.constants) :] == list(launch.constants)
        assert all(p.is_constexpr == (p.name in launch.constants) for p in launch.fn.params)


def test_plans_are_made_once_and_forgotten_when_they_are_many(monkeypatch):
    monkeypatch.setattr(triton_launch, "_MOST", 3)
    plans, made = {}, []
    for key in (1, 1, 2, 3, 1, 4, 1):
        assert remembered(plans, key, lambda: made.append(key) or f"plan {key}") == f"plan {key}"  # noqa: B023
    assert made == [1, 2, 3, 4, 1]
    assert len(plans) <= 3
