"""Prompts that are read in pieces: what one pass over them gives, and the tokens of others in between."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from mllm_fast.kernels.extension import cpu_extension
from PIL import Image

import mllm_fast as mf
from mllm_fast.runtime import direct_passes
from mllm_fast.runtime.prefill import PrefillInPieces
from mllm_fast.serving import reading
from mllm_fast.serving.engine import Engine
from mllm_fast.serving.reading import Pace
from mllm_fast.serving.requests import Generation, TokenEvent

needs_extension = pytest.mark.skipif(cpu_extension()[0] is None, reason="the C++ extension is not built")
PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 90, 3), dtype=np.uint8))
QUESTION = "what color is the circle ?"


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def vlm(request):
    model, processor = getattr(tiny, request.param)()
    return mf.VLM(model.float().eval(), processor)


def prompt_of(vlm):
    inputs, (layout,), _ = vlm.prompts.prepare([[PICTURE]], [QUESTION])
    return inputs, layout


@needs_extension
@pytest.mark.parametrize("sizes", [[5, 1, 7, 100], [100], [3, None], [None]])
def test_pieces_are_the_whole(vlm, sizes):
    inputs, layout = prompt_of(vlm)
    whole = PrefillInPieces(vlm, inputs, layout).read()
    pieces = PrefillInPieces(vlm, inputs, layout)
    if sizes != [None]:
        assert pieces.read(sizes[0]) is None  # the vision tower alone
        assert pieces.begun
    *before, found = [pieces.read(size) for size in sizes]
    assert before == [None] * len(before)
    for name in ("keys", "values"):
        for mine, right in zip(getattr(found, name), getattr(whole, name), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-4, atol=1e-5)
    assert (found.position, found.causal) == (whole.position, whole.causal)
    assert torch.equal(found.input_ids, whole.input_ids)
    assert "forward" not in vars(vlm.text.decoder)


def test_another_model_reads_all_at_once(vlm, monkeypatch):
    monkeypatch.setattr(direct_passes, "direct_decoder", lambda *_: None)
    inputs, layout = prompt_of(vlm)
    found, whole = (PrefillInPieces(vlm, inputs, layout).read(rows) for rows in (3, None))
    torch.testing.assert_close(found.logits, whole.logits)


@needs_extension
def test_a_model_that_changes_meanwhile_reads_all_itself(vlm):
    inputs, layout = prompt_of(vlm)
    pieces = PrefillInPieces(vlm, inputs, layout)
    assert pieces.read(4) is None
    assert pieces.read(4) is None
    handle = vlm.text.layers[0].register_forward_hook(lambda module, args, output: None)
    try:
        found = pieces.read(4)
        torch.testing.assert_close(found.logits, PrefillInPieces(vlm, inputs, layout).read().logits)
    finally:
        handle.remove()


def test_a_piece_takes_no_longer_than_a_pass(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reading.time, "perf_counter", lambda: now[0])

    class Pieces:
        begun, sizes = False, []

        def read(self, rows=None):
            self.sizes.append(rows)
            now[0] += 0.5 if not self.begun else 0.001 * (rows or 100)
            self.begun = True

    pace, pieces = Pace(), Pieces()
    pace.begin()
    now[0] += 0.0808
    pace.end()
    for _ in range(3):
        pace.read(pieces, alone=False)
    assert pieces.sizes == [32, 32, 48]  # 0.6 times 81 ms, at 1 ms a row
    pace.read(pieces, alone=True)
    assert pieces.sizes[-1] is None


class Client:
    """A question about a picture of its own, and the tokens that came."""

    def __init__(self, vlm, picture):
        self.events: list = []
        inputs, (layout,), _ = vlm.prompts.prepare([[picture]], ["Describe the image."])
        self.length = layout.length
        self.wanted = Generation(self.events.append, frozenset(), inputs=inputs, layout=layout, max_tokens=12)

    @property
    def tokens(self):
        return [event.token for event in self.events if isinstance(event, TokenEvent)]


@needs_extension
def test_others_get_their_tokens_meanwhile(shapes, monkeypatch):
    monkeypatch.setattr(Pace, "rows", 16)
    scheduler = Engine(shapes).scheduler
    pictures = [Image.new("RGB", (96, 96), color) for color in ("red", "blue", "green")]
    talking, new, gone = clients = [Client(shapes, picture) for picture in pictures]

    def go_on():
        scheduler.admit()
        scheduler.run_pass()

    scheduler.add(talking.wanted)
    go_on()
    assert scheduler.reading is None  # alone: all at once
    assert len(talking.tokens) == 2
    scheduler.add(new.wanted)
    between = 0
    while not new.tokens:
        go_on()
        between += 1
        assert len(talking.tokens) == min(2 + between, 12)
        assert (scheduler.reading is None) == bool(new.tokens)
    assert between == 1 + -(-new.length // 16)
    scheduler.add(gone.wanted)
    go_on()
    assert gone.wanted in scheduler.everyone()
    assert scheduler.waiting == 1
    gone.wanted.cancelled = True
    while scheduler.busy:
        go_on()
    assert scheduler.reading is None
    assert not gone.tokens
    for client, picture in zip(clients[:2], pictures, strict=False):
        said = shapes.generate(picture, "Describe the image.", max_new_tokens=12)
        assert client.tokens[: len(said.token_ids)] == said.token_ids


@needs_extension
def test_a_prompt_that_is_read_has_its_place(shapes, monkeypatch):
    """While it is read in pieces nobody else takes the batch's last place."""
    monkeypatch.setattr(Pace, "rows", 16)
    scheduler = Engine(shapes, max_batch=2).scheduler
    context = shapes.compress(Image.new("RGB", (96, 96), "red"), keep=0.2)
    talking, new = (Client(shapes, Image.new("RGB", (96, 96), color)) for color in ("red", "blue"))
    ids = shapes.prompts.turn_ids(context.prompt, 1, "Is there a star?")
    asked = Generation(lambda _: None, frozenset(), key="held", context=context, ids=ids, max_tokens=4)
    scheduler.add(talking.wanted)
    scheduler.admit()
    scheduler.run_pass()
    for one in (new.wanted, asked):
        scheduler.add(one)
    most = 0
    while scheduler.busy:
        scheduler.admit()
        most = max(most, len(scheduler.members) + (scheduler.reading is not None))
        scheduler.run_pass()
    assert most == 2
    assert len(new.tokens) == 12
