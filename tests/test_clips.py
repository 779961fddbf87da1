"""The embedded video model, its clips, its training script and its accuracy table."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

import mllm_fast as mf
from mllm_fast.core.assets import CLIPS_WEIGHTS, SAMPLE_VIDEO, SHAPES_WEIGHTS
from mllm_fast.shapes.batches import GRID, IGNORE
from mllm_fast.shapes.build import CLIP_GRID, build_clip_model, build_clip_processor, build_tokenizer
from mllm_fast.shapes.clip_batches import TOKENS, ClipBatches, _clip, coverage
from mllm_fast.shapes.clip_questions import TASKS, ask, describe, half_of
from mllm_fast.shapes.clips import CANVAS, generate_clip
from mllm_fast.shapes.evaluate import weights_digest
from mllm_fast.shapes.evaluate_clips import TABLE, accuracy
from mllm_fast.shapes.scenes import COLORS, SHAPES
from mllm_fast.shapes.train_clips import ClipTrainer, begin_with_pictures, parse


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_clips_are_as_described(seed):
    clip = generate_clip(np.random.default_rng(seed))
    count = len(clip.pixels)
    assert clip.pixels.shape == (count, CANVAS, CANVAS, 3)
    assert 4 <= count <= 8
    assert 1 <= len(clip.objects) <= 3
    assert sum(one.masks.astype(int) for one in clip.objects).max() == 1, "objects must not overlap"
    for one in clip.objects:
        assert one.shape in SHAPES
        assert set(one.colors) <= set(COLORS)
        shown = one.masks.any((1, 2))
        if one.event == "appears":
            assert shown.tolist() == [frame >= one.at for frame in range(count)]
            assert 2 * one.at != count - 1, "the middle belongs to no half"
        else:
            assert shown.all()
        turns = [a != b for a, b in zip(one.colors, one.colors[1:], strict=False)]
        assert turns == [one.event == "turns" and frame + 1 == one.at for frame in range(count - 1)]
        moved = bool((one.masks[0] ^ one.masks[-1]).any())
        assert moved == (one.event in ("moves", "appears"))


def test_a_seed_names_a_clip():
    one, other = (generate_clip(np.random.default_rng(5), 6) for _ in range(2))
    assert (one.pixels == other.pixels).all()
    assert len(one.pixels) == 6
    with pytest.raises(ValueError, match="at least 2 frames"):
        generate_clip(np.random.default_rng(0), 1)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6))
def test_answers_follow_from_the_clip(seed):
    rng = np.random.default_rng(seed)
    clip = generate_clip(rng)
    last = len(clip.pixels) - 1
    for task in TASKS:
        question = ask(clip, rng, task)
        if question is None:
            continue
        first, end = question.frames
        assert 0 <= first <= end <= last
        if task == "describe":
            assert question.answer == describe(clip)
            continue
        one = clip.objects[question.target]
        if task == "start":
            assert question.answer == one.colors[0]
            assert set(one.colors[first : end + 1]) == {question.answer}
        elif task == "end":
            assert question.answer == one.colors[-1]
            assert set(one.colors[first : end + 1]) == {question.answer}
        elif task == "moves":
            assert question.answer == one.colors[0]
            assert [other.event for other in clip.objects if other.shape == one.shape].count("moves") == 1
        else:
            assert (question.answer, end) == half_of(clip, one)
            assert question.answer == ("first" if one.at / (last + 1) < 0.5 else "second")
            assert first == one.at
    with pytest.raises(ValueError, match="task is one of"):
        ask(clip, rng, "sing")


def test_questions_are_prompts_of_their_own():
    """A question of a batch has the ids, the positions and the view of a prompt by the processor."""
    processor = build_clip_processor()
    batches = ClipBatches(processor.tokenizer)
    batch = batches.draw(np.random.default_rng(3), 3, 3, seen=1.0, blind=0.0)
    frames = len(batch.pixel_values) // 3
    for b in range(3):
        for turn in range(1, len(batch.tasks[b]) + 1):
            rows = (batch.turn[b] == turn).nonzero()[:, 0]
            prompt = rows[batch.labels[b, rows] == IGNORE]
            begin = int((batch.turn[b] == 0).sum())
            assert batch.position_ids[b, rows].tolist() == list(range(begin, begin + len(rows)))
            seen = batch.visible[b, int(prompt[-1])].nonzero()[:, 0].tolist()
            assert seen == [*range(begin), *prompt.tolist()]
            text = processor.tokenizer.decode(batch.input_ids[b, prompt].tolist()).replace(" assistant:", "")
            content = [{"type": "image"}] * frames + [{"type": "text", "text": text}]
            spelled = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            spelled = spelled.replace("<image>", "<image>" * TOKENS)
            ids = processor.tokenizer(spelled).input_ids
            assert ids == batch.input_ids[b, [*range(begin), *prompt.tolist()]].tolist()


def test_what_is_hidden_in_training():
    """A question that sees less always sees what it asks about; blind words see no image."""
    tokenizer = build_clip_processor().tokenizer
    batches = ClipBatches(tokenizer)
    rng = np.random.default_rng(8)
    batch = batches.draw(rng, 8, 3, seen=0.0, blind=1.0)
    image = batch.input_ids == batches.image_id
    for b, tasks in enumerate(batch.tasks):
        for turn, task in enumerate(tasks, 1):
            if task == "describe":
                continue
            rows = (batch.turn[b] == turn).nonzero()[:, 0]
            words = rows[batch.labels[b, rows] == IGNORE][:-1]
            assert not batch.visible[b, words][:, image[b]].any()
            assert batch.visible[b, int(rows[-1])][image[b]].any()


def test_clips_in_which_one_of_two_alike_moves():
    rng = np.random.default_rng(3)
    for _ in range(10):
        objects = _clip(rng, 4, 3, moves=1.0).objects
        alike = [{one.event == "moves" for one in objects if one.shape == shape} for shape in SHAPES]
        assert {True, False} in alike
    drawn, plain = (draw(np.random.default_rng(3), 4, 3) for draw in (partial(_clip, moves=0.0), generate_clip))
    assert np.array_equal(drawn.pixels, plain.pixels)  # held-out clips are those of before


def test_halves_are_those_of_the_objects():
    batches = ClipBatches(build_clip_processor().tokenizer)
    drawn = (generate_clip(np.random.default_rng(seed)) for seed in range(99))
    clip = next(clip for clip in drawn if any(one.event == "appears" for one in clip.objects))
    found = batches._halves(clip)
    one = next(one for one in clip.objects if one.event == "appears")
    half, last = half_of(clip, one)
    shown = coverage(one.masks) >= 0.2
    word = batches.encode(half)[0]
    for frame in range(len(clip.pixels)):
        inside = one.at <= frame <= last
        assert ((found[frame] == word) == (shown[frame] & inside)).all() or not inside


def test_the_training_begins_with_the_model_for_pictures():
    processor = build_clip_processor()
    model = build_clip_model(processor.tokenizer)
    begin_with_pictures(model, processor.tokenizer)
    before = LlavaForConditionalGeneration.from_pretrained(SHAPES_WEIGHTS).float()
    mine, theirs = model.get_input_embeddings().weight, before.get_input_embeddings().weight
    known = build_tokenizer()
    for word in ("star", "red", "color"):
        old, new = (one(word, add_special_tokens=False).input_ids[0] for one in (known, processor.tokenizer))
        assert torch.equal(mine[new], theirs[old])
    places = [one.model.vision_tower.state_dict() for one in (model, before)]
    name = next(name for name in places[0] if name.endswith("position_embedding.weight"))
    grid = places[1][name][1:].view(GRID, GRID, -1)[:CLIP_GRID, :CLIP_GRID].flatten(0, 1)
    assert torch.equal(places[0][name][1:], grid)


def test_one_step_of_training(tmp_path):
    trainer = ClipTrainer(
        parse(["--out", str(tmp_path), "--steps", "1", "--batch", "2", "--held-out", "1", "--no-compile"])
    )
    before = trainer.language.layers[0].self_attn.q_proj.weight.clone()
    trainer.run()
    assert not torch.equal(trainer.language.layers[0].self_attn.q_proj.weight, before)
    again = mf.VLM.from_pretrained(str(tmp_path))
    assert again.generate(mf.Video(SAMPLE_VIDEO), "which ring moves?", max_new_tokens=2).token_ids


def test_the_table_is_of_these_weights():
    table = json.loads(TABLE.read_text())
    assert table["weights_sha256"] == weights_digest(CLIPS_WEIGHTS)
    assert table["clips"] >= 500
    assert min(table["accuracy"][task] for task in TASKS[:-1]) >= 0.95
    size = sum(one.stat().st_size for one in CLIPS_WEIGHTS.iterdir())
    assert size <= 12 << 20


def test_the_accuracy_is_that_of_the_table():
    table = json.loads(TABLE.read_text())
    found = accuracy(mf.VLM.from_pretrained("clips"), 12, table["seed"])
    for task in TASKS[:-1]:
        assert found[task] >= table["accuracy"][task] - 0.2


def test_more_than_eight_frames_are_refused():
    clips = mf.VLM.from_pretrained("clips")
    frames = [np.zeros((64, 64, 3), np.uint8)] * 9
    with pytest.raises(mf.InputError, match="at most eight frames"):
        clips.generate(mf.Video(frames), "which star moves?")
