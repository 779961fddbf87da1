"""Masks as they are published: polygons and run lengths in COCO's format, folders of PNGs."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.segmentation import Polygons, Runs, coco, mask_folder
from mllm_fast.evaluation.studies.localisation import Localisation
from mllm_fast.evaluation.worker import ModelChoice

SQUARE = np.zeros((4, 6), bool)  # [height, width]
SQUARE[1:3, 2:5] = True
RUNS = [9, 2, 2, 2, 2, 2, 5]


def packed(counts: list[int]) -> str:
    """COCO's compressed run lengths."""
    text = ""
    for i, count in enumerate(counts):
        number, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            digit, number = number & 31, number >> 5
            more = number != (-1 if digit & 16 else 0)
            text += chr(48 + (digit | 32 * more))
    return text


def notes(*segmentations, **changes) -> dict:
    content = {
        "images": [{"id": 7, "file_name": "a b.jpg", "width": 6, "height": 4}, {"id": 8, "file_name": "none.jpg"}],
        "categories": [{"id": 3, "name": "hot dog"}],
        "annotations": [{"image_id": 7, "category_id": 3, "segmentation": one} for one in segmentations],
    }
    return content | changes


def test_masks_by_hand():
    assert (Runs((6, 4), RUNS).mask() == SQUARE).all()
    assert (Polygons((6, 4), [[2, 1, 4, 1, 4, 2, 2, 2]]).mask() == SQUARE).all()
    two = Polygons((6, 4), [[0, 0, 0, 3, 0, 0], [5, 0, 5, 3, 5, 0]]).mask()
    assert two[:, [0, 5]].all()
    assert not two[:, 1:5].any()


def test_coco(tmp_path):
    """All three ways to write a mask; an image without objects is left out."""
    long = [0, 1000, 70, 20, 2, 4908]  # differences of both signs, numbers of several digits
    size = {"images": [{"id": 7, "file_name": "a b.jpg", "width": 60, "height": 100}]}
    (tmp_path / "long.json").write_text(json.dumps(notes({"counts": packed(long), "size": [100, 60]}, **size)))
    (sample,) = coco(tmp_path / "long.json", tmp_path).list
    assert (sample.things[0].mask == Runs((60, 100), long).mask()).all()
    polygon, runs = [[2, 1, 4, 1, 4, 2, 2, 2]], {"counts": RUNS, "size": [4, 6]}
    short = {"counts": packed(RUNS), "size": [4, 6]}
    (tmp_path / "notes.json").write_text(json.dumps(notes(polygon, runs, short)))
    (sample,) = coco(tmp_path / "notes.json", tmp_path / "pictures").list
    assert sample.name == "a b.jpg"
    assert sample.source == tmp_path / "pictures" / "a b.jpg"
    assert [thing.name for thing in sample.things] == ["hot dog"] * 3
    assert all((thing.mask == SQUARE).all() for thing in pickle.loads(pickle.dumps(sample)).things)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not in COCO's format"),
        ("{}", "KeyError 'categories'"),
        (notes([[0, 0, 1, 1]]), "three points or more"),
        (notes({"counts": [1, 2], "size": [4, 6]}), "sum to 3, its image has 6 x 4"),
        (notes({"counts": [30, -6], "size": [4, 6]}), "sum to 24"),
        (notes([[0, 0, 1, 1, 2, 2]], images=[]), "KeyError 7"),
        (notes(), "holds no object"),
    ],
)
def test_files_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        coco(path, tmp_path)


def test_folders_of_masks_localise_as_scenes_do(tmp_path):
    """The same rows from generated scenes and from images and masks on disk."""
    samples = scenes(2, seed=4)
    for number, sample in enumerate(samples.list):
        sample.image.save(tmp_path / f"{number}.png")
        (tmp_path / "masks" / str(number)).mkdir(parents=True)
        for i, thing in enumerate(sample.things):
            Image.fromarray(thing.mask).save(tmp_path / "masks" / str(number) / f"{thing.name} {i}.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "without.png")
    found = mask_folder(tmp_path / "masks", tmp_path)
    assert [sample.name for sample in found.list] == ["0.png", "1.png"]
    model = ModelChoice(device="cpu", threads=1)
    ours = run(Localisation(objects="all"), samples, model, tmp_path / "ours")
    theirs = run(Localisation(objects="all"), found, model, tmp_path / "theirs")
    assert list(ours.values()) == list(theirs.values())
    assert all(ours.values())


def test_masks_that_do_not_fit(tmp_path):
    """Another size than the image's, or no image at all: rows that say so."""
    samples = scenes(2, seed=4)
    for number, sample in enumerate(samples.list):
        sample.image.save(tmp_path / f"{number}.png")
        (tmp_path / "masks" / str(number)).mkdir(parents=True)
        name = tmp_path / "masks" / str(number) / f"{sample.things[0].name}.png"
        Image.new("1", (9, 9)).save(name)
    name.write_bytes(b"-")
    rows = run(
        Localisation(objects="all"),
        mask_folder(tmp_path / "masks", tmp_path),
        ModelChoice(device="cpu"),
        tmp_path / "out",
    )
    assert "the mask is 9 x 9 pixels, its image 96 x 96" in rows["0.png"][0]["error"]
    assert "is no image" in rows["1.png"][0]["error"]
    for folders, message in ((("gone", "."), "is no folder"), ((".", "masks"), "called like an image")):
        with pytest.raises(InputError, match=message):
            mask_folder(*(tmp_path / folder for folder in folders))
