"""The embedded joint model, and the commands on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from mllm_fast.core.assets import SAMPLE
from mllm_fast.evaluation.joint.bias import Bias, Swap, swap_scenes
from mllm_fast.evaluation.joint.hallucination import Hallucination
from mllm_fast.evaluation.joint.pointing import Pointing, pointed
from mllm_fast.evaluation.joint.quality import JointQuality
from mllm_fast.evaluation.joint.simulatability import Simulatability
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import Samples, scenes
from mllm_fast.evaluation.worker import ModelChoice
from mllm_fast.explain.export import summary
from mllm_fast.joint import JointModel
from mllm_fast.joint.checkpoint import WEIGHTS, joint_folder
from mllm_fast.shapes.evaluate import weights_digest
from mllm_fast.shapes.scenes import COLORS, SHAPES

ROOT = Path(__file__).parent.parent
CLASSES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
SWAP = Swap(("a photo of a red object",), ("a photo of a blue object",))
NEUTRAL = Swap(("a photo of a green object",), ("a photo of a yellow object",))


@pytest.fixture(scope="module")
def joint(shapes):
    return JointModel.from_pretrained("shapes", device="cpu", vlm=shapes)


def test_figures_are_of_these_weights():
    result = json.loads((ROOT / "benchmarks" / "results" / "joint.json").read_text())
    folder = joint_folder("shapes")
    assert result["detector_sha256"] == weights_digest(folder / "detector")
    assert result["alignment_sha256"] == weights_digest(folder, WEIGHTS)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12e6


def test_answers_and_boxes_from_one_embedding(joint):
    seen = joint.see(SAMPLE)
    assert seen.note == ""  # the same grid
    assert joint.generate(seen, "What color is the star?").text == "blue"
    found = joint.detect(seen, ["a photo of a blue star", "a photo of a green star"])
    assert [one.query for one in found] == ["a photo of a blue star"]
    left, top, right, bottom = found[0].box
    assert 60 < left < 68
    assert 5 < top < 14
    assert 80 < right < 90
    assert 26 < bottom < 35
    ex = joint.explain(seen, "What color is the star?")
    weights = ex.box_weights(0)
    assert weights.query == "a photo of a blue"
    (_, score, box), *_ = weights.best(1)
    assert score > 0.1
    assert 60 < (box[0] + box[2]) / 2 < 90
    row, col = divmod(int(ex.heatmap(0, "gradient-alignment").argmax()), 12)
    assert (row, col) in {(1, 8), (1, 9), (2, 8), (2, 9)}


def of(evaluation, samples, shapes, tmp_path, processes=1):
    rows = run(evaluation, samples, ModelChoice(device="cpu"), tmp_path / evaluation.name, processes, vlm=shapes)
    return evaluation.report(rows)


def test_what_is_lost(shapes, tmp_path):
    report = of(JointQuality(["shapes"], CLASSES), scenes(12, 5), shapes, tmp_path)
    figures = report.figures
    assert figures["detector"]["recall"] > 0.8
    assert all(value > 0.7 for value in figures["accuracy"]["shapes"].values())
    assert figures["distance"]["shapes"] < 0.4
    assert len(report.charts) == 1
    assert report.charts[0].png()


def test_own_pictures_are_compared_with_the_models_own_answer(shapes, joint, tmp_path):
    for i, sample in enumerate(scenes(3, 5).list):
        sample.scene.image.save(tmp_path / f"{i}.png")
    from mllm_fast.evaluation.samples import pictures

    report = of(JointQuality(["shapes"], question="Describe the image."), pictures(tmp_path), shapes, tmp_path)
    paths = sorted(tmp_path.glob("*.png"))
    same = [
        joint.generate(path, "Describe the image.").text == shapes.generate(path, "Describe the image.").text
        for path in paths
    ]
    assert report.figures["same"]["shapes"] == pytest.approx(np.mean(same))
    assert "accuracy" not in report.figures


def test_a_judges_captions(shapes, tmp_path):
    class Judge:
        def __init__(self):
            self.settings = {"judge": "length"}

        def score(self, picture, caption):
            assert isinstance(picture, Image.Image)
            return min(10, len(caption.split())), 7

    report = of(JointQuality(["shapes"], judge=Judge()), scenes(2, 5), shapes, tmp_path)
    assert set(report.figures["captions"]) == {"what is true", "the language model alone", "shapes"}
    assert "42 tokens" in " ".join(report.says)


def test_peoples_captions_are_judged_too(shapes, tmp_path):
    """Of the images that have one; another table of captions is another run."""
    from mllm_fast.evaluation.samples import pictures

    class Judge:
        settings: ClassVar[dict] = {"judge": "people"}

        def score(self, picture, caption):
            return (9 if caption == "what people say" else 2), 1

    for i, sample in enumerate(scenes(2, 5).list):
        sample.scene.image.save(tmp_path / f"{i}.png")
    made = JointQuality(["shapes"], judge=Judge(), captions={"1.png": "what people say"})
    report = of(made, pictures(tmp_path), shapes, tmp_path)
    assert report.figures["captions"] == {"people": 9, "the language model alone": 2, "shapes": 2}
    table = next(table for table in report.tables if "judge's score" in table.title)
    assert next((line[0], line[2]) for line in table.rows) == ("people", "1")
    assert JointQuality(["shapes"], judge=Judge()).settings["captions"] != made.settings["captions"]


def test_pointing_and_telling_apart(shapes, tmp_path):
    figures = of(Pointing("shapes"), scenes(10, 5), shapes, tmp_path).figures
    assert figures["least"]["0"]["both"]["box"] > 0.6
    assert figures["least"]["0.02"]["both"]["box"] > 0.8
    report = of(Simulatability("shapes"), scenes(8, 5), shapes, tmp_path)
    assert report.figures["gradient-alignment"] > 0.8
    assert report.figures["logprob"] > 0.8
    assert report.charts[0].png()


def test_pointing_by_hand(joint):
    scene = scenes(1, 5).list[0].scene
    one = scene.objects[0]
    ex = joint.explain(scene.image, f"what color is the {one.shape}?")
    weights = ex.box_weights(0, f"a photo of a {one.color} {one.shape}")
    best = int(weights.weights.argmax())
    left, top, right, bottom = weights.boxes[best].tolist()
    x, y = (max(left, 0) + min(right, 96)) / 2, (max(top, 0) + min(bottom, 96)) / 2
    found = pointed(weights, one.box, one.mask)
    assert found["box"] == float(one.box[0] <= x < one.box[2] and one.box[1] <= y < one.box[3])
    assert found["object"] == float(one.mask[int(y), int(x)])
    assert pointed(weights, one.box, one.mask, least=2.0) == {"box": 0.0, "object": 0.0, "share": 0.0}


def test_hallucinations_are_told_by_boxes(shapes, tmp_path):
    report = of(Hallucination("shapes", list(SHAPES), [0.0, 0.6]), scenes(6, 5), shapes, tmp_path)
    ways = {(one["kind"], one["strength"]): one for one in report.figures["all"]}
    assert set(ways) == {("none", 0.0), ("blur", 0.6), ("noise", 0.6), ("occlusion", 0.6)}
    assert ways["none", 0.0]["score"] > 0.95
    assert ways["none", 0.0]["absent"] + ways["none", 0.0]["present"] == 36
    assert report.charts[0].png()


def test_a_swapped_colour_is_said(shapes, tmp_path):
    samples = swap_scenes(6, 5, "red", "blue")
    report = of(Bias("shapes", SWAP, NEUTRAL), samples, shapes, tmp_path)
    assert report.figures["became"]["pgd"] >= 0.5
    assert report.figures["effects"]["color"]["random"]["mean"] <= 0.2
    assert 0.5 < report.figures["kept"]["random"] <= 1
    assert report.charts[0].png()
    without = [one for one in scenes(20, 9).list if all(thing.color != "red" for thing in one.scene.objects)][:2]
    failed = of(Bias("shapes", SWAP, NEUTRAL), Samples(without, {}), shapes, tmp_path / "other").failed
    assert len(failed) == 2
    assert all("the scene has 0 red objects" in why for why in failed.values())


def test_reports_name_the_joint_model_and_go_on(shapes, tmp_path):
    first = of(Pointing("shapes"), scenes(2, 5), shapes, tmp_path)
    again = of(Pointing("shapes"), scenes(3, 5), shapes, tmp_path, processes=2)
    assert again.figures["questions"] > first.figures["questions"]
    settings = json.loads((tmp_path / "pointing" / "run.json").read_text())
    assert settings["joint"] == "shapes"
    assert len(settings["weights"]) == 12


@pytest.mark.parametrize("ending", [".png", ".html", ".json", ".safetensors"])
def test_saved_with_its_boxes(joint, tmp_path, ending):
    ex = joint.explain(SAMPLE, "What color is the star?")
    path = tmp_path / f"out{ending}"
    ex.save(path, method="gradient-alignment")
    if ending == ".png":
        with Image.open(path) as drawn:
            assert drawn.size[0] > 400
    elif ending == ".html":
        page = path.read_text()
        assert '"name": "gradient alignment"' in page
        assert "a photo of a blue" in page
    elif ending == ".json":
        (token,) = json.loads(path.read_text())["tokens"]
        assert token["boxes"][0]["query"] == "a photo of a blue"
        assert token["boxes"][0]["boxes"][0]["weight"] == 1.0
        assert np.allclose(token["maps"][0], ex.heatmap(0, "gradient-alignment").numpy())
    else:
        from safetensors.numpy import load_file

        tensors = load_file(path)
        assert tensors["image_0.boxes"].shape == (144, 4)
        assert tensors["image_0.box_weights"].shape == (1, 144)
    plain = tmp_path / f"plain{ending}"
    ex.save(plain)
    assert plain.stat().st_size != path.stat().st_size
    assert "boxes" not in json.dumps(summary(ex, numbers=False))


def test_explain_by_a_joint_model(run, tmp_path):
    method = ("--method", "gradient-alignment")
    saved_as = str(tmp_path / "a.json")
    code, out, _ = run("explain", *method, "--query", "a photo of a star", "--json", "-o", saved_as)
    assert code == 0
    assert json.loads(out)["answer"] == "blue"
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["tokens"][0]["boxes"][0]["query"] == "a photo of a star"
    for arguments in (method, ("--joint", "shapes")):
        code, _, err = run("explain", *arguments, "--model", "elsewhere")
        assert code == 2
        assert "joint" in err
    code, _, err = run("explain", "--method", "magic")
    assert code == 2
    assert "--method is one of" in err
    code, out, _ = run("explain", "--method", "relevancy", "-o", str(tmp_path / "r.png"))
    assert code == 0


def test_detect(run, tmp_path):
    code, out, _ = run("detect", "--json", "--out", str(tmp_path / "boxes.png"))
    assert code == 0
    found = json.loads(out)
    there = {one["class"] for one in found["classes"] if one["supported"]}
    assert there == {"star", "cross", "ring", "square"}
    assert [one["supported"] for one in found["nouns"]] == [True] * 4
    with Image.open(tmp_path / "boxes.png") as drawn:
        assert drawn.size == (640, 640)
    code, out, _ = run("detect", "-c", "star", "-c", "dog", "--eyes", "own")
    assert code == 0
    assert "there" in out
    for arguments, message in (
        (("-c", " "), "no class was given"),
        (("-c", "very " * 20 + "small star"), "text window"),
        (("--threshold", "2"), "0 to 1"),
        (("--report", str(SAMPLE)), "takes a folder"),
        (("--strength", "0.5"), "belong to --report"),
        (("--joint", str(tmp_path), "-c", "star"), "holds no joint model"),
        (("--out", str(tmp_path / "a.txt")), ".png"),
    ):
        code, _, err = run("detect", *arguments)
        assert code == 2, arguments
        assert message in err
        assert err.count("\n") == 1


def test_commands_of_joint_models(run, tmp_path):
    code, out, _ = run("detect", "--report", "--count", "4", "--out", str(tmp_path / "d"), "--json")
    assert code == 0
    assert json.loads(out)["hallucination"]["pictures"] == 4
    swap = ("--lower", SWAP.lower[0], "--raise", SWAP.higher[0])
    code, out, _ = run("joint", "bias", *swap, "--count", "2", "--out", str(tmp_path / "b"))
    assert code == 0
    assert "random" in out
    code, out, _ = run("joint", "pointing", "--count", "2", "--out", str(tmp_path / "p"))
    assert code == 0
    code, out, _ = run("joint", "simulatability", "--count", "2", "--out", str(tmp_path / "s"))
    assert code == 0
    code, out, _ = run("joint", "evaluate", "--count", "2", "--out", str(tmp_path / "e"), "--json")
    assert code == 0
    assert json.loads(out)["joint"]["pictures"] == 2
    folder = str(tmp_path / "w")
    options = ("--count", "80", "--batch", "8", "--every", "5", "--hidden", "16")
    code, out, _ = run("joint", "train", "--out", folder, *options, "--json")
    assert code == 0
    assert json.loads(out)["step"] == 9
    assert (tmp_path / "w" / "curve.png").exists()
    assert JointModel.from_pretrained(folder).generate(SAMPLE, "What color is the star?").text
    tuned = ("--out", str(tmp_path / "f"), "--count", "4", "--batch", "2", "--json")
    code, out, _ = run("joint", "finetune", "--joint", folder, *tuned)
    assert code == 0
    assert json.loads(out)["steps"] == 2
    for arguments, message in (
        (("bias", "--lower", "a", "--raise", "b"), "have colours to swap"),
        (("bias", *swap, "--images", str(tmp_path)), "nothing to do with the question"),
        (("evaluate", "--masks", "x"), "--masks belong to images"),
        (("train", "--out", folder, *options), "holds a trained alignment"),
        (("train", "--out", str(tmp_path / "x"), "--count", "5"), "too few"),
        (("simulatability", "--images", str(tmp_path)), "needs your images' objects"),
    ):
        code, _, err = run("joint", *arguments)
        assert code == 2, arguments
        assert message in err
