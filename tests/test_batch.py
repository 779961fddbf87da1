"""Sequences that come and go between passes are each computed as if alone: in float64 on random models of the three
families, against sessions of one question, so that the tolerance (1e-9 on logits of 1 to 10) is rounding alone."""

from __future__ import annotations

import random

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mllm_fast as mf
from mllm_fast.context.compress import prefill_and_score
from mllm_fast.runtime.batch import Batch
from mllm_fast.runtime.prefill import PrefillInPieces
from mllm_fast.runtime.prefix_pool import PrefixPool
from mllm_fast.runtime.shared_prefix import SharedPrefixDecoder

PROMPT = "describe this picture"
RED = Image.new("RGB", (24, 64), "red")


def alone(vlm: mf.VLM, keys, values, position: int, ids: list[int], first: int) -> torch.Tensor:
    """Logits of a session of this sequence alone: its first tokens at once, then one a pass."""
    session = SharedPrefixDecoder(vlm.text, keys, values, position, 1, vlm.backend)
    with session.recording(), torch.no_grad():
        rows = [session.read([ids[:first]])[0]] + [session.read([[token]])[0] for token in ids[first:]]
    return torch.stack(rows)


def whole_prompt(vlm: mf.VLM, picture, prompt: str):
    inputs, (layout,), _ = vlm.prompts.prepare([[picture]], [prompt])
    return PrefillInPieces(vlm, inputs, layout).read()


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_and_go(vlm, picture, seed):
    draw = random.Random(seed)
    contexts = [
        vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query"),
        vlm.compress(RED, keep=3, prompt=PROMPT, score="key_norm"),
    ]
    full = whole_prompt(vlm, picture, PROMPT)
    prefixes = [(c.keys, c.values, c.position, f"context {i}") for i, c in enumerate(contexts)]
    prefixes.append((full.keys, full.values, full.position, None))
    batch, going, done = Batch(vlm.text, vlm.backend), [], 0
    while done < 12 or going:
        for _ in range(draw.randrange(3) if done < 12 else 0):
            keys, values, position, name = draw.choice(prefixes)
            first, more = draw.randint(1, 6), draw.randint(0, 40 if draw.random() < 0.2 else 5)
            ids = [draw.randrange(4, 20) for _ in range(first + more)]
            row = batch.join(keys, values, position, ids[:first], name)
            going.append((row, ids[first:], iter(alone(vlm, keys, values, position, ids, first))))
            done += 1
        if not going:
            continue
        with batch.running(), torch.no_grad():
            logits = batch.read()
        assert len(logits) == len(batch.rows) == len(going)
        for row, _, expected in list(going):
            torch.testing.assert_close(logits[batch.rows.index(row)], next(expected), rtol=0, atol=1e-9)
        for entry in list(going):
            row, rest, _ = entry
            if rest:
                row.unread = [rest.pop(0)]
            else:
                batch.leave(row)
                going.remove(entry)
    assert not batch.rows


@pytest.mark.parametrize("name", ["internvl_gpt_oss", "paligemma2"])
def test_sinks_and_soft_caps(name, picture):
    """A token's attention lies in two calls, one of which takes the sinks."""
    model, processor = families.build(name)
    test_rows_that_come_and_go(mf.VLM(model.double(), processor), picture, 0)


def test_a_watched_row_sums_what_compression_keeps_by(vlm, picture):
    """A description that is generated in the batch, beside a question, gives the mass that `compress` sums."""
    expected = prefill_and_score(vlm, picture, PROMPT, ["generated"], max_new_tokens=6)
    full = whole_prompt(vlm, picture, PROMPT)
    batch = Batch(vlm.text, vlm.backend)
    other = batch.join(full.keys, full.values, full.position, [5, 6, 7])
    token = int(full.logits.argmax())
    row = batch.join(full.keys, full.values, full.position, [token], watch=True)
    ids, stop = [token], vlm.settings().stop_ids
    while len(ids) < 6 and ids[-1] not in stop:
        with batch.running(), torch.no_grad():
            ids.append(int(batch.read()[batch.rows.index(row)].argmax()))
        other.unread, row.unread = [8], [ids[-1]]
    mean = row.mass / (len(ids) - 1)
    image = expected.layout.positions("image")
    torch.testing.assert_close(mean[:, image], expected.masses["generated"][:, image].to(mean), rtol=0, atol=1e-6)


def test_a_shared_prefix_lies_there_once(vlm, picture):
    ctx = vlm.compress(picture, keep=0.5, prompt=PROMPT, score="key_norm")
    batch = Batch(vlm.text, vlm.backend)
    batch.join(ctx.keys, ctx.values, ctx.position, [5], "one")
    held = batch.nbytes
    for _ in range(20):
        batch.join(ctx.keys, ctx.values, ctx.position, [5], "one")
    assert batch.nbytes == held
    for _ in range(20):
        batch.join(ctx.keys, ctx.values, ctx.position, [5])
    assert batch.nbytes > 4 * held


def test_what_cannot_be_done_is_refused(vlm, picture):
    full = whole_prompt(vlm, picture, PROMPT)
    batch = Batch(vlm.text, vlm.backend)
    with pytest.raises(ValueError, match="at least one token"):
        batch.join(full.keys, full.values, full.position, [])
    with pytest.raises(ValueError, match="not shared"):
        batch.join(full.keys, full.values, full.position, [5], "one", watch=True)
    row = batch.join(full.keys, full.values, full.position, [5])
    with batch.running(), torch.no_grad():
        batch.read()
        row.unread = [5, 6]
        with pytest.raises(ValueError, match="one token at a time"):
            batch.read()


def test_a_name_is_forgotten_with_its_slot():
    """Five names for four slots: the oldest one's place is taken, and when it comes again it is laid anew."""
    prefixes = PrefixPool()
    content = torch.randn(5, 1, 1, 8, 4)
    for name in range(5):
        prefixes.release(prefixes.acquire(list(content[name]), list(content[name]), name + 1))
    again = prefixes.acquire(list(content[0]), list(content[0]), 1)
    assert torch.equal(again.stack.keys[0][again.slot, :, again.stack.room - 8 :], content[0, 0])
    last = prefixes.acquire(list(content[4]), list(content[4]), 5)
    assert last.slot != again.slot


@settings(max_examples=60)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 40)), max_size=40))
def test_prefixes_are_found_where_they_were_laid(steps):
    """Taken and given back in any order, every prefix in use is what was put there; a name has one place."""
    prefixes, held = PrefixPool(), []
    content = {}
    for taking, name, length in steps:
        if not taking and held:
            prefixes.release(held.pop(name % len(held))[0])
            continue
        if name and name in content:
            tensor = content[name]
        else:
            tensor = torch.randn(2, 1, length, 4)
            content[name] = tensor
        one = prefixes.acquire(list(tensor), list(-tensor), name or None)
        held.append((one, tensor))
        for prefix, expected in held:
            first = prefix.stack.room - prefix.length
            for layer in range(2):
                assert torch.equal(prefix.stack.keys[layer][prefix.slot, :, first:], expected[layer])
                assert torch.equal(prefix.stack.values[layer][prefix.slot, :, first:], -expected[layer])
            assert prefix.stack.starts([prefix.slot], torch.device("cpu"))[prefix.slot] == first
        assert len({(id(p.stack), p.slot) for p, _ in held}) == len({id(p) for p, _ in held})
