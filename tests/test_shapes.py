"""The embedded model, its scenes, its training script and its accuracy table."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import HANG

from mllm_fast.models.loading import model_folder
from mllm_fast.shapes.batches import IGNORE, BatchMaker, Mix, patch_targets
from mllm_fast.shapes.build import build_processor, build_tokenizer
from mllm_fast.shapes.evaluate import TABLE, Asker, single_turn, weights_digest
from mllm_fast.shapes.questions import TASKS, ask, describe
from mllm_fast.shapes.scenes import COLORS, SHAPES, generate_scene
from mllm_fast.shapes.second_renderer import draw_scene
from mllm_fast.shapes.train import Trainer, parse


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), draw=st.sampled_from([generate_scene, draw_scene]))
def test_scenes_are_as_described(seed, draw):
    scene = draw(np.random.default_rng(seed))
    assert scene.pixels.shape == (96, 96, 3)
    assert 2 <= len(scene.objects) <= 4
    assert sum(o.mask.astype(int) for o in scene.objects).max() == 1, "objects must not overlap"
    centers = [o.center[0] for o in scene.objects]
    assert all(b - a >= 2.5 for a, b in itertools.pairwise(centers))
    for o in scene.objects:
        assert o.shape in SHAPES
        assert o.color in COLORS
        left, top, right, bottom = o.box
        assert not o.mask[:, :left].any()
        assert not o.mask[bottom:].any()
        assert 13 <= max(right - left, bottom - top) <= 36  # a turned square is wider than its side
        inside = scene.pixels[o.mask].mean(0)
        assert np.linalg.norm(inside - scene.background) > 30, "an object must be seen"


def test_a_seed_names_a_scene():
    one, other = (generate_scene(np.random.default_rng(5)) for _ in range(2))
    assert (one.pixels == other.pixels).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_answers_follow_from_the_scene(seed):
    rng = np.random.default_rng(seed)
    scene = generate_scene(rng)
    pairs = [(o.color, o.shape) for o in scene.objects]
    for task in TASKS:
        question = ask(scene, rng, task)
        if question is None:
            continue
        if task == "color":
            assert (question.answer, question.keywords[0]) in pairs
            assert scene.objects[question.target].color == question.answer
        elif task == "shape":
            assert (question.keywords[0], question.answer) in pairs
        elif task == "exists" and len(question.keywords) == 2:
            assert (question.answer == "yes") == (tuple(question.keywords) in pairs)
        elif task == "exists":
            assert (question.answer == "yes") == (question.keywords[0] in [w for p in pairs for w in p])
        elif task == "describe":
            assert question.answer == describe(scene)
    with pytest.raises(ValueError, match="task is one of"):
        ask(scene, rng, "weight")


def test_tokenizer_round_trip():
    tokenizer = build_tokenizer()
    text = "a red circle, a blue square"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_training_sees_what_the_processor_makes():
    """A packed training sample, question by question, equals the processor's prompt: ids and pixels."""
    processor = build_processor()
    maker = BatchMaker(processor.tokenizer)
    batch = maker.draw(np.random.default_rng(3), 2, 4, Mix(chained=1.0, describe=1.0))
    scene = generate_scene(np.random.default_rng(3), max_objects=4)
    first = batch.input_ids[0][: int((batch.turn[0] == 1).nonzero()[-1]) + 1]
    text = processor.tokenizer.decode(first[len(maker.prefix) :])
    question, answer = text.split(" assistant: ")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.strip()}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer.removesuffix("</s>")}]},
    ]
    inputs = processor(images=scene.image, text=processor.apply_chat_template(chat), return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == first.tolist()
    torch.testing.assert_close(inputs["pixel_values"][0], batch.pixel_values[0], rtol=0, atol=1e-5)


def test_isolated_questions_see_the_picture_and_themselves():
    maker = BatchMaker(build_tokenizer())
    batch = maker.draw(np.random.default_rng(0), 3, 4, Mix(chained=0.0, describe=1.0))
    for b in range(3):
        rows = (batch.turn[b] == 2).nonzero()[:, 0]
        seen = batch.visible[b, rows[-1]]
        assert seen[: len(maker.prefix)].all()
        assert set(batch.turn[b, seen].tolist()) == {0, 2}
        assert batch.position_ids[b, rows[0]] == len(maker.prefix)


@pytest.mark.parametrize("later", ["part", "by object", "everything"])
def test_later_questions_see_what_a_context_keeps(later):
    """Of a turn that asked for a description: its prompt, not the answer, and a part of the image."""
    maker = BatchMaker(build_tokenizer())
    mix = Mix(chained=0.0, prefixed=1.0, later=later)
    batch = maker.draw(np.random.default_rng(0), 30, 4, mix)
    image = torch.zeros(maker.length, dtype=torch.bool)
    image[maker.image_start : len(maker.prefix)] = True
    shares = []
    for b in range(30):
        assert batch.tasks[b][0] == "describe"
        asking = (batch.turn[b] == 1) & (batch.labels[b] == IGNORE)
        described = (batch.turn[b] == 1) & ~asking
        for turn in range(2, len(batch.tasks[b]) + 1):
            rows = (batch.turn[b] == turn).nonzero()[:, 0]
            seen = batch.visible[b, rows[-1]]
            assert seen[asking].all()
            assert not seen[described].any()
            assert seen[: maker.image_start].all()
            assert set(batch.turn[b, seen & ~image].tolist()) == {0, 1, turn}
            assert batch.position_ids[b, rows[0]] == len(maker.prefix) + int(asking.sum())
            assert batch.input_ids[b, rows[0]] == maker.tokenizer.eos_token_id
            shares.append(float(seen[image].float().mean()))
    whole, nothing = (np.mean(np.array(shares) == share) for share in (1, 0))
    assert whole == 1 if later == "everything" else 0.15 < whole < 0.35
    assert (nothing > 0.2) == (later == "by object")


@pytest.mark.parametrize("again", [0.0, 1.0])
def test_a_description_can_be_asked_for_twice(again):
    """In a later turn, which sees the asking words of the first and not its answer; `again` of the samples do."""
    maker = BatchMaker(build_tokenizer())
    mix = Mix(chained=0.0, prefixed=1.0, describe_turns=3, later="everything", again=again)
    tasks = maker.draw(np.random.default_rng(0), 20, 3, mix).tasks
    assert all(each[0] == "describe" for each in tasks)
    assert [each.count("then describe") for each in tasks] == [int(again)] * 20


def test_the_last_stage_hides_what_the_description_did_not_look_at(tmp_path):
    """Layer by layer the description and later turns see the tokens of largest attention; no other view changes."""
    trainer = Trainer(parse(["--out", str(tmp_path), "--no-compile"]))
    batch = trainer.batches.draw(trainer.rng, 6, 4, Mix(chained=0.3, prefixed=0.6, later="everything"))
    image = slice(trainer.batches.image_start, trainer.batches.image_start + 144)
    mass = trainer.attended(batch, batch.visible)
    each = trainer.compress(batch, batch.visible)
    assert each.shape == (6, *batch.visible.shape)
    counts = set()
    for b, tasks in enumerate(batch.tasks):
        said = (batch.turn[b] == 1) & (batch.labels[b] != IGNORE)
        later = (said | (batch.turn[b] >= 2)) & torch.tensor(tasks[-1].startswith("then"))
        counts.add(int(each[0, b, said, image].sum(1)[0]))
        assert torch.equal(each[:, b, ~later], batch.visible[b, ~later].expand(6, -1, -1))
        for row in later.nonzero()[:, 0]:
            seen = each[:, b, row, image]
            assert torch.equal(each[:, b, row, image.stop :], batch.visible[b, row, image.stop :].expand(6, -1))
            kept = seen.sum(1)
            counts.add(int(kept[0]))
            assert (kept == kept[0]).all()
            for layer in range(6):
                if 0 < kept[0] < 144:
                    assert mass[layer, b, seen[layer]].min() >= mass[layer, b, ~seen[layer]].max()
    assert len(counts) > 3


def test_attention_of_a_description_is_the_models_own(tmp_path):
    trainer = Trainer(parse(["--out", str(tmp_path), "--no-compile"]))
    batch = trainer.batches.draw(trainer.rng, 2, 4, Mix(chained=0.0, prefixed=1.0))
    found = trainer.attended(batch, batch.visible)
    b, end = 1, trainer.processor.tokenizer.eos_token_id
    rows = (batch.turn[b] == 1) & (batch.labels[b] != IGNORE) & (batch.labels[b] != end)
    stop = int(rows.nonzero()[-1]) + 1
    inputs = {"input_ids": batch.input_ids[b : b + 1, :stop], "pixel_values": batch.pixel_values[b : b + 1]}
    with torch.no_grad():
        attentions = trainer.model(**inputs, output_attentions=True).attentions
    first = trainer.batches.image_start
    for layer, alpha in enumerate(attentions):
        expected = alpha[0].mean(0)[rows[:stop], first : first + 144].mean(0)
        torch.testing.assert_close(found[layer, b], expected, rtol=0.05, atol=1e-4)  # `attended` runs in bfloat16


def test_patch_targets():
    scene = generate_scene(np.random.default_rng(1))
    targets = patch_targets([scene])
    o = scene.objects[0]
    x, y = (int(c) // 8 for c in o.center)
    assert o.mask[y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].mean() > 0.2, "choose another seed for this test"
    assert targets.color[0, y * 12 + x] == list(COLORS).index(o.color) + 1


def test_embedded_model_answers(shapes):
    """A small sample of what evaluate.py measures on a thousand scenes, by both renderers."""
    asker = Asker(shapes.model, shapes.processor)
    for renderer in ("own", "second"):
        accuracy = single_turn(asker, renderer, 40, seed=5)
        assert min(accuracy.values()) >= 0.8, accuracy


def test_the_map_points_at_the_object(shapes):
    scene = generate_scene(np.random.default_rng(12))
    question = ask(scene, np.random.default_rng(0), "color")
    ex = shapes.explain(scene.image, question.text)
    assert ex.text == question.answer
    row, col = divmod(int(ex.heatmap(0).argmax()), 12)
    assert scene.objects[question.target].mask[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8].any()


def test_table_and_weights_are_in_step():
    table = json.loads(TABLE.read_text())
    assert table["weights_sha256"] == weights_digest(model_folder("shapes")), "run evaluate.py --write"
    assert table["scenes"] >= 1000


def test_training_script_runs(tmp_path):
    """Every stage, a step each: what it saves loads and answers."""
    command = [sys.executable, "-m", "mllm_fast.shapes.train", "--out", tmp_path / "m", "--vision-steps", "1"]
    command += ["--word-steps", "1", "--steps", "1", "--context-steps", "1", "--compressed-steps", "1"]
    command += ["--batch", "2", "--no-compile"]
    for folder, start in (("m", []), ("n", ["--start", tmp_path / "m"])):
        command[4] = tmp_path / folder
        subprocess.run([*command, *start], check=True, capture_output=True, timeout=HANG, cwd=tmp_path)
    import mllm_fast as mf

    vlm = mf.VLM.from_pretrained(tmp_path / "n", device="cpu")
    assert vlm.generate(generate_scene(np.random.default_rng(0)).image, "what color is the star?", max_new_tokens=1)
