"""Maps of videos: their sums, pictures, animations and page; contexts and shares by moment; the command line."""

from __future__ import annotations

import io
import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import mllm_fast as mf
from mllm_fast.cli import main
from mllm_fast.core.assets import SAMPLE, SAMPLE_VIDEO
from mllm_fast.evaluation.studies.moments import Moments
from mllm_fast.evaluation.videos import clips as clip_samples
from mllm_fast.evaluation.videos import videos

END, START = "What color is the star at the end?", "What color is the star at the start?"


@pytest.fixture(scope="module")
def clips():
    return mf.VLM.from_pretrained("clips")


@pytest.fixture(scope="module")
def video(clips):
    return clips.prompts.load(mf.Video(SAMPLE_VIDEO))[0]


@pytest.fixture(scope="module")
def ex(clips, video):
    return clips.explain(video, END)


def test_the_sample_is_answered(clips, video):
    assert clips.generate(video, END).text == "green"
    assert clips.generate(video, START).text == "blue"
    assert clips.generate(video, "Which ring moves?").text == "yellow"
    assert clips.generate(video, "In which half does the orange circle appear?").text == "first"


def test_maps_are_those_of_the_moments(ex):
    found = ex.video()
    maps = found.maps(0)
    assert maps.shape == (8, 8, 8)
    assert [moment.seconds[0] for moment in found.moments] == [i / 2 for i in range(8)]
    for i, image in enumerate(ex.layout.videos[0]):
        assert torch.equal(maps[i], ex.heatmap(0, image=image))
    scores = ex.position_scores(0).sum(0)
    curve = found.curve(0)
    for i in range(8):
        assert float(curve[i]) == pytest.approx(float(scores[ex.layout.positions(f"frame:{i}")].sum()), abs=1e-5)
        assert float(curve[i]) == pytest.approx(float(maps[i].sum()), abs=1e-4)
    shares = found.shares(0)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares[0]) == pytest.approx(float(maps[0].clamp(min=0).sum() / maps.clamp(min=0).sum()), abs=1e-5)


def test_the_peak_is_on_the_star_at_the_end(ex, clips, video):
    moment, box = ex.video().peak(0)
    assert moment.seconds[0] >= 1.0  # it turns green at one second
    left, top, right, bottom = (int(edge) for edge in box)
    pixels = np.asarray(ex.images[moment.frames[0]])[top:bottom, left:right].reshape(-1, 3).astype(int)
    assert ((pixels[:, 1] > 130) & (pixels[:, 0] < 100)).any(), "a pixel of the green star"
    first, _ = clips.explain(video, START).video().peak(0)
    assert first.seconds[0] < 1.0


def test_moments_are_knocked_out(clips, video):
    """The star's colour at the start is lost with the frames that show it, and stays without the others."""
    said = {
        rule: clips.generate(video, START, knockout=f"{rule}->query+generated", max_new_tokens=2).text
        for rule in ("time:0-0.5", "time:1.0-3.5", "frame:0-1")
    }
    assert said["time:1.0-3.5"] == "blue"
    assert said["time:0-0.5"] == said["frame:0-1"] != "blue"


def test_shares_by_moment(clips, video):
    whole = clips.generate(video, END, attention_share=True).attention_share
    each = clips.generate(video, END, attention_share="moments").attention_share
    torch.testing.assert_close(sum(whole.values()), torch.ones(6, 4), rtol=0, atol=1e-5)
    assert "timestamp" in whole
    moments = sum(each[f"image:{i}"] for i in range(8))
    torch.testing.assert_close(moments, whole["image"], rtol=0, atol=1e-5)
    short = mf.Video(SAMPLE_VIDEO, num_frames=4)
    with pytest.raises(mf.InputError, match="as many images and moments in every prompt"):
        clips.generate([video, short], [END, END], attention_share="moments")


def test_contexts_with_a_budget_a_frame(clips, video):
    whole = clips.compress(video, 0.1, score="query")
    each = clips.compress(video, 0.1, score="query", budget="frame")
    assert each.kept_counts().tolist() == [[7] * 8] * 6  # of 64 tokens, rounded up
    assert whole.kept_counts().sum(1).tolist() == [52] * 6
    assert each.settings["budget"] == "frame"
    assert "budget" not in whole.settings
    every = clips.compress(video, 1.0, score="query", budget="frame")
    assert torch.equal(every.keys, clips.compress(video, 1.0, score="query").keys)
    for layer in range(6):  # the best of each frame are those that score highest there
        kept = each.positions[layer]
        prefill = clips.compress(video, 1 / 64, score="query", budget="frame").positions[layer]
        assert set(prefill.tolist()) <= set(kept.tolist())
    with pytest.raises(mf.InputError, match="budget is one of all, frame"):
        clips.compress(video, 0.1, budget="second")
    assert each.image().width > 100


def test_pictures(ex, clips, video, tmp_path):
    ex.save(tmp_path / "one.png", token=0)
    longer = clips.explain(video, "describe the video.")
    longer.save(tmp_path / "sheet.png")
    for name in ("one", "sheet"):
        with Image.open(tmp_path / f"{name}.png") as drawn:
            assert drawn.width > 500
            assert "fingerprint" in json.dumps(drawn.info)


def test_animations(ex, clips, video, tmp_path):
    import av

    ex.save(tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as drawn:
        assert drawn.n_frames == 8
        assert json.loads(drawn.getexif()[0x010E])["question"] == END
    ex.save(tmp_path / "a.mp4", token=0)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = list(container.decode(video=0))
        assert json.loads(container.metadata["comment"])["answer"] == ex.text
    assert len(frames) == 7 * 5 + 8  # half a second each at ten a second, the last one longer
    several = clips.explain(video, END, "a green star")
    several.save(tmp_path / "b.webp")
    with Image.open(tmp_path / "b.webp") as drawn:
        assert drawn.n_frames == 24
    still = mf.VLM.from_pretrained("shapes").explain(SAMPLE, "What color is the star?")
    with pytest.raises(mf.InputError, match="the prompt has none"):
        still.save(tmp_path / "c.webp")
    with pytest.raises(mf.InputError, match="the prompt has no video"):
        still.video()
    assert not (tmp_path / "c.webp").exists()


def test_the_page_has_a_scrubber(ex, tmp_path):
    ex.save(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    data = json.loads(re.search(r"const data = (.*);\n", page)[1].replace("\\u003c", "<"))
    assert [one["video"] for one in data["images"]] == [0] * 8
    assert [one["time"] for one in data["images"]] == [f"{i / 2:.2f} s" for i in range(8)]
    assert len(data["tokens"][0]["maps"]) == 8


def test_number_files_know_the_moments(ex, tmp_path):
    ex.save(tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert [one["moment"]["frames"] for one in found["images"]] == [[i] for i in range(8)]
    assert found["segments"]["video:0"] == found["segments"]["video"]
    ex.save(tmp_path / "a.safetensors")


def test_checks_and_text_maps(ex):
    (found,) = ex.verify()
    assert found.verdict == "holds"
    words = ex.text_map(0)
    assert "timestamp" in words.segments
    assert ex.video().to_frame(0)["share"].sum() == pytest.approx(1)


def run(capsys, *arguments: object) -> str:
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["mllm-fast", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == (2 if said.err.startswith("mllm-fast:") else 0), said.err
    return said.out + said.err


def test_the_command_line(capsys, tmp_path):
    out = tmp_path / "a.webp"
    said = run(capsys, "explain", "--model", "clips", "--out", out)
    assert "green" in said
    assert "s: x " in said
    assert out.exists()
    four = run(capsys, "generate", SAMPLE_VIDEO, "--model", "clips", "-q", START, "--frames", 4, "--json")
    assert json.loads(four.splitlines()[0])["answer"] == "blue"
    both = run(capsys, "generate", SAMPLE_VIDEO, "--model", "clips", "--frames", 4, "--fps", 1)
    assert both == "mllm-fast: give fps, the frames a second, or num_frames, how many in all, but not both\n"
    none = run(capsys, "generate", tmp_path / "a.jpg", "--frames", 4)
    assert "are of videos, and none is given" in none
    missing = run(capsys, "generate", tmp_path / "a.mp4", "--model", "clips")
    assert "no such file" in missing
    context = tmp_path / "a.safetensors"
    run(capsys, "compress", "--model", "clips", "--keep", "100%", "--score", "query", "--out", context)
    assert run(capsys, "ask", context, START).startswith("blue")
    closed = run(
        capsys, "generate", "--model", "clips", "-q", START, "--block", "frame:30->query", SAMPLE_VIDEO, "--frames", 8
    )
    assert "no frame that the model read lies in 'frame:30'" in closed


def test_the_evaluation(clips):
    study = Moments(shares=(1.0,))
    rows = {}
    for sample in clip_samples(8).list:
        rows[sample.name] = study.rows(clips, sample)
    first = rows["clip 0"][0]
    assert set(first["maps"]) == {"logprob", "attention", "random"}
    assert {one["budget"] for one in first["contexts"]} == {"all", "frame"}
    report = study.report(rows)
    assert report.figures["questions"] == 8
    assert set(report.figures["tasks"]) == {"start", "end", "moves", "appears"}
    event = report.figures["knockout"]["event"]
    assert event["fall"] > report.figures["knockout"]["random"]["fall"]
    assert report.charts[0].png().startswith(b"\x89PNG")
    json.dumps(report.figures, allow_nan=False)


def test_a_folder_of_videos_with_events(clips, tmp_path):
    (tmp_path / "a.webp").write_bytes(SAMPLE_VIDEO.read_bytes())
    events = {
        "a.webp": [
            {"question": END, "start": 1.0, "end": 3.5, "answer": "green"},
            {"question": START, "start": 0, "end": 0.5},
        ]
    }
    (tmp_path / "events.json").write_text(json.dumps(events))
    (sample,) = videos(tmp_path).list
    rows = Moments(shares=(1.0,)).rows(clips, sample)
    assert rows[0]["right"] is True
    assert rows[1]["right"] is None
    assert rows[1]["maps"]["logprob"]["in_time"] is True
    for wrong, words in (
        ({}, "is {"),
        ({"b.webp": [{"question": "x", "start": 0, "end": 1}]}, "names b.webp"),
        ({"a.webp": []}, "at least one"),
        ({"a.webp": [{"question": "x", "start": 2, "end": 1}]}, "ends after it starts"),
        ({"a.webp": [{"question": 3, "start": 2, "end": 1}]}, 'has a "question"'),
    ):
        (tmp_path / "events.json").write_text(json.dumps(wrong))
        with pytest.raises(mf.InputError, match=re.escape(words)):
            videos(tmp_path)


def test_streams_explain_word_by_word(clips, video, ex):
    with clips.stream(video, END, explain=True) as stream:
        (step,) = list(stream)
    torch.testing.assert_close(step.explanation.video().maps(0), ex.video().maps(0), rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    step.image().save(buffer, "PNG")


def test_a_model_without_a_video_processor_reads_images():
    """The embedded model for pictures was never taught clips, but takes their frames."""
    shapes = mf.VLM.from_pretrained("shapes")
    frame = SAMPLE.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = shapes.generate(mf.Video([frame, frame]), "What color is the star?", max_new_tokens=2)
    assert [image.moment.as_image for image in said.layout.images] == [True, True]
    with pytest.raises(mf.InputError, match="how this model's processor lays out the tokens of a video is not known"):
        shapes.generate(mf.Video([frame], as_images=False), "What color is the star?")
    shapes.processor.video_token = "<video>"
    with pytest.warns(UserWarning, match="a way of its own to read videos"):
        assert shapes.generate(mf.Video([frame, frame]), "What color is the star?", max_new_tokens=2).text == said.text
