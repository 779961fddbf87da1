"""Videos of every family that has a processor for them: layouts, equality with eager float64, contexts.

The video processors need torchvision; without it the tests of families that have one are skipped.
"""

from __future__ import annotations

from importlib.util import find_spec

import families_video
import numpy as np
import pytest
import torch
from family_oracle import Double, Eager, Parts, full_cache, log_probs, run, writes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_families import patches_alone

import mllm_fast as mf
from mllm_fast.runtime.hooks import recording
from mllm_fast.runtime.kv_cache import CACHE

QUESTION, ANSWER, NEAR = "what moves", "a red", 1e-6
HAVE = find_spec("torchvision") is not None
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not HAVE and name != "gemma3", reason="torchvision is not installed"))
    for name in families_video.BUILD
]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def frames(count: int, size: tuple[int, int] = (90, 40), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(count)]


class Family:
    """A model with a video of five frames at two a second, and what the tests of its family share."""

    def __init__(self, name: str):
        model, self.processor = families_video.BUILD[name]()
        self.name, self.model = name, model.double()
        self.vlm = mf.VLM(self.model, self.processor)
        self.parts = Parts.of(self.model)
        self.video = mf.Video(frames(5), frame_rate=2)
        self.media = self.vlm.prompts.load(self.video)
        inputs, (self.layout,), _ = self.vlm.prompts.prepare([self.media], [QUESTION])
        self.inputs, self.prompt = dict(inputs), self.layout.length
        self.ids = self.processor.tokenizer(ANSWER, add_special_tokens=False).input_ids

    def extended(self, ids: list[int]) -> dict:
        more = torch.tensor([ids])
        inputs = {**self.inputs, "input_ids": torch.cat([self.inputs["input_ids"], more], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(ids)))
        return inputs


@pytest.fixture(scope="module", params=NAMES)
def one(request):
    with Double():
        return Family(request.param)


@pytest.fixture(autouse=True)
def _double():
    with Double():
        yield


def near(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=NEAR)


def said(one, count, close=None):
    with Eager(one.parts, close), torch.no_grad():
        options = {CACHE: full_cache(one.parts), "max_new_tokens": count, "do_sample": False}
        return one.model.generate(**one.inputs, **options)[0, one.prompt :].tolist()


def test_logits_and_generation(one):
    own = run(one.parts, one.inputs).logits
    with recording(one.vlm.text, 1), torch.no_grad():
        got = one.model(**one.inputs).logits[0]
    near(got, own)
    for options in ({}, {"attention_share": True}):
        mine = one.vlm.generate(one.video, QUESTION, max_new_tokens=5, **options).token_ids
        assert mine == said(one, 5)[: len(mine)]


@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_scores(one, norm):
    ex = one.vlm.explain(one.video, QUESTION, ANSWER, final_norm=norm)
    seen = run(one.parts, one.extended(one.ids[:-1]))
    worst, largest = 0.0, 0.0
    for t, token in enumerate(one.ids[:2]):
        row = one.prompt - 1 + t
        final = seen.final[row] if norm == "frozen" else None
        for layer in seen.alpha:
            base = log_probs(one.parts, seen.inputs[layer][row], final)[token]
            heads, positions = writes(one.parts, seen, layer, row)
            truth = log_probs(one.parts, seen.inputs[layer][row] + heads, final)[:, token] - base
            worst = max(worst, float((ex.head_scores[t, layer].double() - truth).abs().max()))
            each = log_probs(one.parts, seen.inputs[layer][row] + positions[:, : row + 1], final)[..., token] - base
            mine = ex.position_scores(t, [(layer, head) for head in range(len(heads))])[:, : row + 1].double()
            worst, largest = max(worst, float((mine - each).abs().max())), max(largest, float(each.abs().max()))
    assert worst <= NEAR * largest


@pytest.mark.parametrize("segment", ["frame:2", "time:1.0-1.6", "video", "timestamp"])
def test_knockouts_of_moments(one, segment):
    if segment == "timestamp" and not len(one.layout.timestamps):
        pytest.skip("this processor writes nothing beside frames")
    closed = one.layout.positions(segment)
    from_here = int(one.layout.images[-1].positions.max()) + 1  # rows behind the video

    def close(rows, keys):
        pairs = torch.zeros(keys, keys, dtype=torch.bool)
        pairs[from_here:, closed] = True
        return pairs[keys - rows :]

    rule = mf.Knockout(segment, tuple(range(from_here, one.prompt + 6)))
    plan = one.vlm.plan(rule, [one.layout])
    with recording(one.vlm.text, 1, plan), torch.no_grad():
        got = one.model(**one.inputs).logits[0]
    near(got, run(one.parts, one.inputs, close).logits)
    mine = one.vlm.generate(one.video, QUESTION, knockout=rule, max_new_tokens=4).token_ids
    assert mine == said(one, 4, close)[: len(mine)]


def test_contexts(one, tmp_path):
    """A context that keeps everything is the whole sequence; its file knows the moments."""
    context = one.vlm.compress(one.video, keep=1.0, prompt=QUESTION, score="query")
    ids = list(context.questions.ids("which half ?", context.vlm.settings(3)))
    wanted = run(one.parts, one.extended(ids)).logits[-1]
    session = context.questions.decoder(1)
    with context.questions.running(), session.recording():
        near(session.read([ids])[0], wanted)
    context.save(tmp_path / "a.safetensors")
    loaded = mf.Context.load(tmp_path / "a.safetensors", one.vlm)
    assert [image.moment for image in loaded.layout.images] == [image.moment for image in context.layout.images]
    assert torch.equal(loaded.layout.timestamps, context.layout.timestamps)
    again = loaded.ask("which half ?", max_new_tokens=3)
    assert again.token_ids == context.ask("which half ?", max_new_tokens=3).token_ids
    own = one.vlm.generate(one.video, QUESTION, max_new_tokens=4)
    assert context.describe(max_new_tokens=4).token_ids == own.token_ids


def test_streams_and_batches(one):
    alone = one.vlm.explain(one.video, QUESTION, max_new_tokens=3)
    with one.vlm.stream(one.video, QUESTION, explain=True, max_new_tokens=3) as stream:
        steps = list(stream)
    assert [step.token_id for step in steps] == alone.token_ids
    near(steps[0].head_scores, alone.head_scores[0])
    other = mf.Video(frames(5, seed=1), frame_rate=2)
    both = one.vlm.generate([one.video, other], [QUESTION, QUESTION + " now"], max_new_tokens=3)
    singles = [one.vlm.generate(v, q, max_new_tokens=3) for v, q in ((one.video, QUESTION), (other, QUESTION + " now"))]
    assert [answer.token_ids for answer in both] == [answer.token_ids for answer in singles]


def test_the_callers_own_generate(one):
    """Knockouts inside `knocked_out` follow the tokens of videos as well, and `recording` explains them."""
    rule = mf.Knockout("image+image_separator", "generated")  # ids alone do not tell row ends from other tokens
    mine = one.vlm.generate(one.video, QUESTION, knockout=rule, max_new_tokens=4).token_ids
    with one.vlm.knocked_out(rule):
        output = one.model.generate(**one.inputs, max_new_tokens=4, do_sample=False)
    assert output[0, one.prompt :].tolist()[: len(mine)] == mine
    with one.vlm.recording() as recorded:
        one.model.generate(**one.inputs, max_new_tokens=2, do_sample=False)
    ex = recorded.explanation(one.video)
    near(ex.head_scores, one.vlm.explain(one.video, QUESTION, ex.token_ids).head_scores)
    assert ex.layout.images[0].moment == one.layout.images[0].moment


def test_two_videos_and_a_picture(one):
    if one.name == "smolvlm":
        with pytest.raises(mf.InputError, match="images beside videos"):
            one.vlm.generate([Image.fromarray(frames(1)[0]), one.video], QUESTION)
        one.vlm.generate([Image.fromarray(frames(1)[0]), mf.Video(frames(2), as_images=True)], QUESTION)
        return
    picture = Image.fromarray(frames(1, (40, 40))[0])
    second = mf.Video(frames(5, seed=3), frame_rate=4)
    layout = one.vlm.generate([picture, one.video, second], QUESTION, max_new_tokens=1).layout
    assert layout.images[0].moment is None
    assert {image.moment.video for image in layout.images[1:]} == {0, 1}
    named = [layout.positions(f"video:{i}") for i in (0, 1)]
    assert torch.equal(torch.cat(named), layout.positions("video"))
    assert len(layout.positions("video:1/frame:0")) == len(layout.positions("video:0/frame:0")) > 0
    ids = one.vlm.prompts.prepare([one.vlm.prompts.load([picture, one.video, second])], [QUESTION])[0]["input_ids"][0]
    every = torch.cat([image.positions for image in layout.images])
    assert bool((every.diff() > 0).all())
    marks = torch.isin(ids, torch.tensor(sorted(one.vlm.prompts.image_tokens.both))).nonzero()[:, 0]
    assert set(every.tolist()) <= set(marks.tolist())


def test_segments_cover_every_token_once(one):
    ex = one.vlm.explain(one.video, QUESTION, ANSWER)
    seen = torch.zeros(ex.layout.length, dtype=torch.long)
    for name in ("system", "image", "image_separator", "timestamp", "query", "generated"):
        seen[ex.layout.positions(name)] += 1
    assert bool((seen == 1).all())


def test_what_a_moment_shows(one):
    """A square that is painted into one frame changes the tokens of its moment, and most the one that covers it."""
    model, processor = families_video.BUILD[one.name]()
    patches_alone(model)
    vlm = mf.VLM(model.double(), processor)
    pixels = frames(5)

    def tokens(array):
        inputs, (layout,), _ = vlm.prompts.prepare([vlm.prompts.load(mf.Video(array, frame_rate=2))], [QUESTION])
        seen = []
        take = lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        handle = vlm.text.layers[0].register_forward_pre_hook(take, with_kwargs=True)
        with torch.no_grad():
            vlm.model(**inputs)
        handle.remove()
        return seen[0][0], layout

    before, layout = tokens(pixels)
    left, _, right, _ = layout.images[0].box
    for frame, x in ((0, 10), (2, 60), (4, 40)):
        x = int(min(max(x, left + 1), right - 8))
        painted = [one.copy() for one in pixels]
        painted[frame][12:18, x : x + 6] = 255 - painted[frame][12:18, x : x + 6]
        change = (tokens(painted)[0] - before).norm(dim=-1)
        mine = layout.positions(f"frame:{frame}")
        outside = change.clone()
        outside[mine] = 0
        assert float(outside.max()) < 1e-9 < float(change[mine].max())
        image = layout.images[layout.moments(f"frame:{frame}")[0]]
        box = image.token_boxes()[int(change[image.positions].argmax())]
        assert box[0] - 6 <= x + 3 <= box[2] + 6
        assert box[1] - 6 <= 15 <= box[3] + 6


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(1, 11), st.integers(20, 130), st.integers(20, 130), st.sampled_from([0.5, 3, 24, 29.97]))
def test_layouts_of_odd_sizes(one, count, width, height, rate):
    """The tokens that a layout counts are those that the processor makes; times are those of the frames."""
    media = one.vlm.prompts.load(mf.Video(frames(count, (width, height)), frame_rate=rate))
    inputs, (layout,), _ = one.vlm.prompts.prepare([media], [QUESTION])
    ids = inputs["input_ids"][0]
    marks = torch.isin(ids, torch.tensor(sorted(one.vlm.prompts.image_tokens.both))).nonzero()[:, 0]
    ends = 1 if one.name == "llava_onevision" else 0
    assert len(layout.positions("video")) == len(marks) - ends
    moments = [image.moment for image in layout.images]
    assert [f for moment in moments for f in moment.frames] == list(range(count))
    assert all(abs(moment.seconds[0] - moment.frames[0] / rate) < 1e-9 for moment in moments)
    for image in layout.images:
        boxes = image.token_boxes()
        assert len(boxes) == len(image.positions)
        assert boxes.min() >= -1e-6 or one.name == "llava_next_video"
        assert boxes[:, 2].max() <= width + 1e-6
        assert boxes[:, 3].max() <= height + 1e-6


def test_frames_are_chosen_as_the_processor_chooses(one):
    videos = getattr(one.processor, "video_processor", None)
    many = frames(40, (20, 20))
    chosen = one.vlm.prompts.load(mf.Video(many, frame_rate=10, num_frames=6))[0].indices
    if videos is None:
        assert chosen == (0, 8, 16, 23, 31, 39)
        return
    from transformers.video_utils import VideoMetadata

    about = VideoMetadata(total_num_frames=40, fps=10.0, duration=4.0)
    assert list(chosen) == [int(i) for i in videos.sample_frames(metadata=about, num_frames=6)]
    every = one.vlm.prompts.load(mf.Video(many, frame_rate=10, fps=2))[0].indices
    assert list(every) == [int(i) for i in videos.sample_frames(metadata=about, fps=2)]


def test_frames_as_images(one):
    """Any model can read frames as images; the layout still knows when they are shown."""
    video = mf.Video(frames(3), frame_rate=2, as_images=True)
    layout = one.vlm.generate(video, QUESTION, max_new_tokens=1).layout
    assert [image.moment.seconds[0] for image in layout.images] == [0.0, 0.5, 1.0]
    assert all(image.moment.as_image for image in layout.images)
    plain = one.vlm.generate([Image.fromarray(frame) for frame in frames(3)], QUESTION, max_new_tokens=1).layout
    assert torch.equal(plain.positions("image"), layout.positions("image"))


def test_one_frame_alone(one):
    assert one.vlm.generate(mf.Video(frames(1)), QUESTION, max_new_tokens=1).layout.images[0].moment.frames == (0,)
