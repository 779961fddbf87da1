"""Masks as they are published: polygons and run lengths in COCO's format, folders of PNGs."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mllm_fast.core.errors import InputError
from mllm_fast.core.images import load_image
from mllm_fast.evaluation.coco_objects import CocoMask, coco
from mllm_fast.evaluation.mask_folder import mask_folder
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.studies.localisation import Localisation
from mllm_fast.evaluation.worker import ModelChoice

tools = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO

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


def of(tmp_path, content, pictures=None, **options):
    path = tmp_path / "notes.json"
    path.write_text(json.dumps(content))
    return coco(path, pictures or tmp_path, **options)


def test_coco(tmp_path):
    """All three ways to write a mask, as pycocotools reads them; an image without objects is left out."""
    long = [0, 1000, 70, 20, 2, 4908]  # differences of both signs, numbers of several digits
    size = {"images": [{"id": 7, "file_name": "a b.jpg", "width": 60, "height": 100}]}
    (sample,) = of(tmp_path, notes({"counts": packed(long), "size": [100, 60]}, **size)).list
    wanted = np.repeat(np.arange(6) % 2 == 1, long).reshape(60, 100).T
    assert (sample.things[0].mask == wanted).all()
    polygon, runs = [[2, 1, 5, 1, 5, 3, 2, 3]], {"counts": RUNS, "size": [4, 6]}
    short = {"counts": packed(RUNS), "size": [4, 6]}
    (sample,) = of(tmp_path, notes(polygon, runs, short), tmp_path / "pictures").list
    assert sample.name == "a b.jpg"
    assert sample.source == tmp_path / "pictures" / "a b.jpg"
    assert [thing.name for thing in sample.things] == ["hot dog"] * 3
    assert all((thing.mask == SQUARE).all() for thing in pickle.loads(pickle.dumps(sample)).things)


@given(
    st.lists(
        st.lists(st.floats(-3, 40, allow_nan=False), min_size=6, max_size=16).map(lambda one: one[: len(one) // 2 * 2]),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=60, deadline=None)
def test_polygons_are_pycocotools(polygons):
    """A square of 10 x 10 has 100 pixels, and any other polygons have those that COCO's own code gives."""
    square = CocoMask((32, 24), [[5, 5, 15, 5, 15, 15, 5, 15]]).mask()
    assert square.sum() == 100
    found = CocoMask((32, 24), polygons).mask()
    content = {
        "images": [{"id": 1, "width": 32, "height": 24}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": polygons}],
    }
    api = COCO()
    api.dataset = content | {"categories": [{"id": 1}]}
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert (found == api.annToMask(api.anns[1]).astype(bool)).all()


GOOD = [[0, 0, 3, 0, 3, 3, 0, 3]]
PACKED = {"counts": packed(RUNS), "size": [4, 6]}
ODD = {
    "too few points": ({"segmentation": [[0, 0, 1, 1]]}, "without a polygon of three points or more"),
    "an odd number": ({"segmentation": [[0, 0, 1, 1, 2, 2, 3]]}, "without a polygon of three points or more"),
    "no number": ({"segmentation": [[0, 0, 1, 1, 2, None]]}, "without a polygon of three points or more"),
    "not finite": ({"segmentation": [[0, 0, 1, 1, 2, float("nan")]]}, "without a polygon of three points or more"),
    "null": ({"segmentation": None}, "without a mask"),
    "empty": ({"segmentation": []}, "without a mask"),
    "absent": ({"segmentation": {}}, "without a mask"),
    "short runs": ({"segmentation": {"counts": [1, 2], "size": [4, 6]}}, "run lengths that do not fit"),
    "negative runs": ({"segmentation": {"counts": [30, -6], "size": [4, 6]}}, "run lengths that do not fit"),
    "runs of another size": ({"segmentation": {"counts": RUNS, "size": [6, 4]}}, "run lengths that do not fit"),
    "cut runs": ({"segmentation": {"counts": PACKED["counts"][:-1], "size": [4, 6]}}, "run lengths that do not fit"),
    "a text": ({"segmentation": "polygon"}, "run lengths that do not fit"),
    "no such image": ({"image_id": 99}, "of no known image"),
    "no image": ({"image_id": None}, "of no known image"),
    "no such category": ({"category_id": 99}, "of no known category"),
    "an image without a size": ({"image_id": 8}, "without a width and height"),
}


@pytest.mark.parametrize("name", ODD)
def test_one_odd_annotation_among_good_ones(name, tmp_path):
    change, words = ODD[name]
    content = notes(GOOD, PACKED)
    odd = {"id": 4711, "image_id": 7, "category_id": 3, "segmentation": GOOD} | change
    content["annotations"].insert(1, odd)
    found = of(tmp_path, content)
    (sample,) = found.list
    assert [thing.mask.sum() for thing in sample.things] == [9, 6]
    (note,) = found.notes
    assert "1 of 3 annotations" in note
    assert words in note
    assert "4711" in note


def test_odd_annotations_that_are_used(tmp_path):
    """A polygon of two points beside a good one, and a crowd."""
    content = notes([[0, 0, 1, 1], *GOOD], PACKED)
    content["annotations"][1] |= {"iscrowd": 1, "id": 5}
    found = of(tmp_path, content)
    assert [thing.mask.sum() for thing in found.list[0].things] == [9, 6]
    assert sorted(found.notes) == [
        "notes.json: 1 of 2 annotations used as one object each, being crowds (5)",
        "notes.json: 1 of 2 annotations used without polygons of fewer than three points (number 0)",
    ]


def test_a_null_among_the_lists(tmp_path):
    content = notes(GOOD)
    for name in ("images", "categories", "annotations"):
        content[name].append(None)
    found = of(tmp_path, content)
    assert len(found.list[0].things) == 1
    assert "being no object of JSON" in found.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not in COCO's format"),
        ("{}", "lists of images, annotations and categories"),
        ("[1]", "lists of images, annotations and categories"),
        (notes([[0, 0, 1, 1]]), r"no object can be used; .* three points or more"),
        (notes(), "no object can be used; it holds none"),
    ],
)
def test_files_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        coco(path, tmp_path)


def photo(path, orientation: int, size=(6, 4)) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("about", ["stored", "upright"])
def test_masks_stand_as_the_upright_image_does(orientation, about, tmp_path):
    """The orientation is found where sizes tell it; where they do not, the option decides and a note says so."""
    photo(tmp_path / "a b.png", orientation)
    stored = Image.fromarray(SQUARE.astype(np.uint8) * 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.info["exif"] = exif.tobytes()
    upright = np.asarray(ImageOps.exif_transpose(stored)) > 0
    mask = SQUARE if about == "stored" else upright
    runs = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs["counts"] = runs["counts"].decode()
    images = [{"id": 7, "file_name": "a b.png", "width": mask.shape[1], "height": mask.shape[0]}]
    told = orientation == 1 or orientation >= 5
    for option in ("auto", about):
        found = of(tmp_path, notes(runs, images=images), orientation=option)
        assert bool(found.notes) == (not told and option == "auto")
        if told or option == about or about == "upright":
            assert (found.list[0].things[0].mask == upright).all()
            assert found.list[0].things[0].mask.shape == load_image(tmp_path / "a b.png").size[::-1]


def test_sizes_that_fit_no_orientation(tmp_path):
    photo(tmp_path / "a b.jpg", 1, (9, 9))
    (sample,) = of(tmp_path, notes(GOOD)).list
    assert sample.problem.endswith("has 9 x 9 pixels, its annotations are of 6 x 4")


def test_without_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    (sample,) = of(tmp_path, notes(GOOD)).list
    with pytest.raises(InputError, match=r"pip install .*\[coco\]"):
        sample.things[0].mask  # noqa: B018


def test_the_command_line_knows_coco_s_file_by_its_content(run, tmp_path):
    for number, sample in enumerate(scenes(2, seed=4).list):
        sample.image.save(tmp_path / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 96, "height": 96} for n in range(2)]
    square = [[20, 20, 70, 20, 70, 70, 20, 70]]
    annotations = [{"image_id": n, "category_id": 3, "segmentation": square} for n in (0, 1, 2)]
    content = notes(images=images) | {"annotations": annotations}
    path = tmp_path / "objects.coco"
    path.write_text(json.dumps(content))
    command = ["eval", "localisation", "--images", tmp_path, "--masks", path, "--out", tmp_path / "out"]
    code, _, err = run(*map(str, command))
    assert code == 0, err
    said = "objects.coco: 1 of 3 annotations left out, of no known image (number 2)"
    assert said in " ".join(err.split())
    assert said in (tmp_path / "out" / "localisation" / "report.html").read_text()


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
