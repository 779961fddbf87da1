"""What the first rank of a divided server tells the others: they hear the same requests, in the same order."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mllm_fast.core.errors import InputError
from mllm_fast.core.layout import ImageLayout, Tile, TokenLayout
from mllm_fast.runtime.sampling import Sampling
from mllm_fast.serving.lockstep import Lockstep
from mllm_fast.serving.requests import ContextSpec, FailureEvent, FinishEvent, Generation, SideTask

CPU = torch.device("cpu")


class Wire:
    """Stands for the two ranks of a `Split`: what one sends the other receives."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def rank(self, number: int) -> SimpleNamespace:
        def told(content: Any = None) -> Any:
            if number:
                return self.sent.pop(0)
            self.sent.append(content)
            return content

        return SimpleNamespace(rank=number, told=told, told_numbers=told)


@pytest.fixture
def ranks():
    wire, ran = Wire(), []
    make = lambda order, files: ran.append((order, files)) or iter([1])  # noqa: E731
    return Lockstep(wire.rank(0), make, CPU), Lockstep(wire.rank(1), make, CPU), ran


def request(**more: Any) -> tuple[Generation, list[Any]]:
    events: list[Any] = []
    image = ImageLayout(torch.arange(1, 5), (8, 8), (Tile(2, 2, (0.0, 0.0, 8.0, 8.0)),), (1, 1), 0)
    layout = TokenLayout(7, 7, (image,), torch.tensor([5]))
    pixels = torch.rand(1, 3, 4, 4)
    inputs = {"input_ids": torch.arange(7)[None], "pixel_values": pixels, "image_sizes": [(8, 8)]}
    short = {**inputs, "input_ids": inputs["input_ids"][:, :5]}
    spec = ContextSpec(short, layout, "Describe.", 0.05, "query", 9, budget="frame")
    given = {"key": "a", "spec": spec, "ids": [4, 5], "inputs": inputs, "layout": layout} | more
    return Generation(
        sink=events.append, stop_ids={2, 3}, max_tokens=6, sampling=Sampling(0.5, 0.9, 7), **given
    ), events


def test_a_request_arrives_as_it_is(ranks):
    leader, follower, _ = ranks
    wanted, _ = request(log_probs=3)
    leader.tell([wanted], [], ["old"])
    (heard,), forgotten = follower.hear()
    assert forgotten == ["old"]
    assert (heard.stop_ids, heard.max_tokens, heard.sampling) == ({2, 3}, 6, Sampling(0.5, 0.9, 7))
    assert (heard.key, heard.ids, heard.context, heard.constraint) == ("a", [4, 5], None, None)
    assert torch.equal(heard.inputs["pixel_values"], wanted.inputs["pixel_values"])
    assert torch.equal(heard.spec.inputs["input_ids"], wanted.inputs["input_ids"][:, :5])
    assert heard.inputs["image_sizes"] == [[8, 8]]
    plain = {one.name for one in fields(ContextSpec)} - {"inputs", "layout"}
    assert {name: getattr(heard.spec, name) for name in plain} == {name: getattr(wanted.spec, name) for name in plain}
    for layout in (heard.layout, heard.spec.layout):
        assert layout.segments.keys() == wanted.layout.segments.keys()
        assert all(torch.equal(layout.segments[name], at) for name, at in wanted.layout.segments.items())
        assert layout.images[0].tiles == wanted.layout.images[0].tiles


def test_who_is_late_or_cancelled_is_so_everywhere(ranks):
    leader, follower, _ = ranks
    (late, events), (given_up, _), (other, _) = request(deadline=time.monotonic() - 1), request(), request()
    leader.tell([late, given_up, other], [], [])
    heard, _ = follower.hear()
    assert isinstance(events[0].error, TimeoutError)
    leader.tell([], [given_up], [])
    follower.hear()
    assert [one.cancelled for one in (late, given_up, other)] == [True, True, False]
    assert [one.cancelled for one in heard] == [True, True, False]
    other.sink(FinishEvent("stop"))
    leader.tell([], [other], [])  # it has ended: nothing is told of it
    follower.hear()
    assert not heard[2].cancelled


def test_contexts_are_freed_with_those_of_the_first_rank(ranks):
    leader, follower, _ = ranks
    made, theirs = (type("Made", (), {})() for _ in range(2))
    leader.keep(made)
    follower.keep(theirs)
    asked, _ = request(context=made, spec=None)
    leader.tell([asked], [], [])
    (heard,), _ = follower.hear()
    assert heard.context is theirs
    asked.context = None
    del made
    gc.collect()
    leader.tell([], [], [])
    follower.hear()
    again, events = request(context=theirs, spec=None)
    assert leader.tell([again], [], []) == []  # of a context that was not made in step
    assert isinstance(events[0].error, KeyError)
    assert follower.hear() == ([], [])


def test_side_tasks_are_made_from_their_order(ranks):
    leader, follower, ran = ranks
    events: list[Any] = []
    task = SideTask(lambda: iter([1]), events.append, order=({"question": "what?"}, [b"one", b"two"]))
    leader.tell([task], [], [])
    (heard,), _ = follower.hear()
    assert next(heard.make()) == 1
    assert ran == [({"question": "what?"}, [b"one", b"two"])]


def test_the_first_rank_chooses(ranks):
    leader, follower, _ = ranks
    assert leader.chosen(lambda: 5) == 5
    assert follower.chosen(lambda: pytest.fail("the others do not choose")) == 5
    with pytest.raises(ZeroDivisionError):
        leader.chosen(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="could not choose"):
        follower.chosen(lambda: 0)


def test_a_constraint_is_known_to_be_elsewhere(ranks):
    leader, follower, _ = ranks
    wanted, _ = request()
    wanted.constraint = SimpleNamespace()  # type: ignore[assignment]
    leader.tell([wanted], [], [])
    (heard,), _ = follower.hear()
    assert heard.constraint is not None
    with pytest.raises(AssertionError, match="chosen by the first rank"):
        heard.constraint.masked(torch.zeros(3))


def test_the_end_and_inputs_that_cannot_be_told(ranks):
    leader, follower, _ = ranks
    wanted, events = request(inputs={"lock": threading.Lock()})
    assert leader.tell([wanted], [], []) == []
    assert isinstance(events[0].error, InputError)
    assert "an input 'lock' of the class lock" in str(events[0].error)
    assert follower.hear() == ([], [])
    leader.stop()
    assert follower.hear() is None


def test_events_reach_their_readers(ranks):
    leader, _, _ = ranks
    wanted, events = request()
    leader.tell([wanted], [], [])
    wanted.sink(FailureEvent(ValueError()))
    assert isinstance(events[0].error, ValueError)
