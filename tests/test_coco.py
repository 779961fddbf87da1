"""COCO's photos of one animal and its colour, and random samples."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.coco_colors import Photo, colors_of, read_photos, with_colors, with_sample
from mllm_fast.evaluation.coco_objects import coco
from mllm_fast.evaluation.judges.judge import read_vocabulary
from mllm_fast.evaluation.samples import sampled
from mllm_fast.evaluation.studies.evidence import Evidence
from mllm_fast.shapes.scenes import generate_scene


@pytest.mark.parametrize(
    ("caption", "colors"),
    [
        ("A small brown furry dog on a couch.", {"brown"}),
        ("a black and white Puppy", {"black", "white"}),
        ("The dog is brown and white.", {"brown", "white"}),
        ("a dog that is grey runs", {"gray"}),
        ("Dogs, which is black", {"black"}),
        ("a red ball near a dog", set()),
        ("a dog and a white fence", set()),
        ("a dog and brown leaves", set()),
        ("a brown cat beside a dog", set()),
        ("a black cat and dog", set()),
        ("a brownish dog", set()),
        ("a hot dog", set()),
    ],
)
def test_the_rule_for_captions(caption, colors):
    assert colors_of("dog", caption) == colors


def objects(*names):
    """A file of objects: one image for each list of (category, crowd)."""
    categories = {name: i for i, name in enumerate(("dog", "cat", "car"), 1)}
    notes = [
        {"image_id": i, "category_id": categories[name], "iscrowd": crowd, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
        for i, shown in enumerate(names)
        for name, crowd in shown
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(len(names))]
    return {
        "images": images,
        "annotations": notes,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }


def test_every_photo_has_its_reason(tmp_path):
    shown = [[("car", 0)], [("dog", 0), ("cat", 0)], [("dog", 0), ("dog", 0)], [("dog", 1)], [("dog", 0), ("car", 0)]]
    (tmp_path / "o.json").write_text(json.dumps(objects(*shown, [("cat", 0)], [("cat", 0)], [("dog", 0)])))
    photos, _ = read_photos(tmp_path / "o.json")
    captions = {4: ["a brown dog"], 5: ["a cat sits"], 6: ["a white cat", "a gray cat"], 7: ["a dog"]}
    found = with_colors(photos, captions, {"7.png": "golden"})
    assert [(photo.animal, photo.color, photo.reason) for photo in found] == [
        ("", "", "no animal"),
        ("", "", "several animals: cat, dog"),
        ("dog", "", "2 of dog"),
        ("dog", "", "a crowd of dog"),
        ("dog", "brown", ""),
        ("cat", "", "the captions name no colour"),
        ("cat", "", "the captions name gray, white"),
        ("dog", "golden", ""),
    ]
    asked = with_colors(photos, captions, None, lambda photo: f"The {photo.animal} is Brown.")
    assert [photo.color for photo in asked[4:]] == ["brown", "brown", "", "brown"]  # 6: captions go before the model

    def missing(photo):
        raise FileNotFoundError(f"{photo.file_name} is not there")

    assert with_colors(photos, {}, None, missing)[5].reason.endswith("5.png is not there")


def test_a_sample_depends_on_its_seed_alone():
    photos = [Photo(i, f"{i}.jpg", "dog", "brown", "" if i % 3 else "no animal") for i in range(30)]
    used = lambda count, seed: [p.key for p in with_sample(photos, count, seed) if not p.reason]  # noqa: E731
    usable = [i for i in range(30) if i % 3]
    assert used(5, 1) == used(5, 1) == sorted(used(5, 1))
    assert set(used(5, 1)) < set(usable)
    assert used(5, 1) != used(5, 2)
    assert set(used(5, 1)) <= set(used(9, 1))
    assert used(20, 1) == usable
    assert used(7, 3) == sorted(np.array(usable)[np.random.default_rng(3).permutation(20)[:7]].tolist())
    reasons = {p.reason for p in with_sample(photos, 5, 1)}
    assert reasons == {"", "no animal", "not in the sample"}
    for count in (0, 21):
        with pytest.raises(InputError, match="at most all 20"):
            with_sample(photos, count, 1)
    with pytest.raises(InputError):
        sampled([], 1, 0)


def test_the_command_prepares_what_the_evaluations_take(tmp_path, run, shapes):
    """On scenes in COCO's format, with captions: the same evidence as on the scenes themselves."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    content = {"images": [], "annotations": [], "categories": []}
    captions, ids = [], {"star": 1, "circle": 2, "square": 3}
    content["categories"] = [{"id": number, "name": name} for name, number in ids.items()]
    for i in range(6):
        scene = generate_scene(np.random.default_rng([7, i]))
        scene.image.save(pictures / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 96})
        for thing in scene.objects:
            if thing.shape in ids:
                ends = np.flatnonzero(np.diff(np.r_[0, thing.mask.T.ravel(), 0]))
                runs = np.diff(np.r_[0, ends, 96 * 96]).tolist()
                content["annotations"].append(
                    {"image_id": i, "category_id": ids[thing.shape], "segmentation": {"counts": runs}}
                )
                captions.append({"image_id": i, "caption": f"There is a {thing.color} {thing.shape}."})
    (tmp_path / "objects.json").write_text(json.dumps(content))
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    names = [option for name in ids for option in ("--animal", name)]
    files = ["--annotations", tmp_path / "objects.json", "--captions", tmp_path / "captions.json"]
    code, shown, err = run("coco", *files, *names, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(shown)
    manifest = list(csv.DictReader((out / "manifest.csv").read_text().splitlines()))
    used = [row for row in manifest if row["state"] == "used"]
    assert len(manifest) == 6
    assert 0 < len(used) == told["used"] < 6
    assert sum(told["dropped"].values()) == 6 - len(used)
    sentences = list(csv.DictReader((out / "sentences.csv").read_text().splitlines()))
    for row, photo in zip(sentences, used, strict=True):
        a, c, other = photo["animal"], photo["color"], row["other_animal"]
        assert other in ids
        assert other != a
        assert row["question"] == f"Q: What is the color of the {a}? A:"
        assert row["S0"] == f"{a.capitalize()} is {c}. Q: What is the color of the {a}? A:"
        assert row["S1"] == f"{other.capitalize()} is {c}. Q: What is the color of the {a}? A:"
        assert row["S2"] == f"{a.capitalize()} is {c}. Q: What is the color of the {other}? A:"
    samples = coco(out / "objects.json", pictures)
    assert [sample.things[0].name for sample in samples.list] == [f"{p['color']} {p['animal']}" for p in used]
    (row,) = Evidence(words=read_vocabulary(out / "vocabulary.json")).rows(shapes, samples.list[0])
    assert (row["noun"], row["attribute"]) == (used[0]["animal"], used[0]["color"])
