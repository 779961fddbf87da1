"""The files and drawings of an explanation."""

from __future__ import annotations

import json
import os
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import mllm_fast as mf
from mllm_fast.drawing.heatmap import colors, upsample
from mllm_fast.explain import figure
from mllm_fast.explain.export import write_whole

ANSWER = "red <b> blue"


@pytest.fixture(scope="module")
def ex(built, picture):
    return mf.VLM(*built("internvl")).explain(picture, "what </script><script> color ?", "red green blue")


@settings(max_examples=50)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    cut=st.floats(0, 0.4),
)
def test_upsampling_keeps_the_integral(rows, cols, width, height, cut):
    """True to area: the integral over the image is that of the cells, whatever the sizes, so no cell
    grows at its neighbours' cost; and a flat grid stays flat."""
    box = (cut * width, cut * height, (1 - cut) * width, (1 - cut) * height)
    grid = np.random.default_rng(rows * cols).random((rows, cols))
    values, covered = upsample(grid, box, (width, height))
    area = (box[2] - box[0]) * (box[3] - box[1]) / (rows * cols)
    np.testing.assert_allclose((values * covered).sum(), grid.sum() * area, rtol=1e-9)
    flat, covered = upsample(np.ones((rows, cols)), box, (width, height))
    np.testing.assert_allclose(flat[covered > 1e-9], 1.0)


def test_whole_cells_are_exact():
    values, _ = upsample(np.array([[1.0, 2.0], [3.0, 4.0]]), (0, 0, 4, 4), (4, 4))
    assert values.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_lightness_rises_with_heat():
    rgb = colors(np.linspace(0, 1, 50))
    lightness = rgb @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()


def test_png(ex, tmp_path):
    ex.save(tmp_path / "one.png", token="red")
    ex.save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "sheet.png") as sheet:
        assert one.size != sheet.size
        assert one.width > 600
        one.verify()
        sheet.verify()


def test_png_shows_the_hottest_cell(built, tmp_path):
    """The overlay is hottest where the map is highest."""
    from mllm_fast.drawing.heatmap import overlay

    grid = np.zeros((4, 4))
    grid[1, 2] = 1.0
    drawn = np.asarray(overlay(Image.new("RGB", (32, 32), "gray"), grid, (0, 0, 32, 32), 1.0, 64), float)
    changed = np.abs(drawn - drawn[0, 0]).sum(-1) > 1
    rows, cols = np.nonzero(changed)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (16, 31, 32, 47)


def test_json_holds_all_numbers(ex, tmp_path):
    ex.save(tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text())
    assert [t["text"].strip() for t in data["tokens"]] == ["red", "green", "blue"]
    np.testing.assert_allclose(data["head_scores"], ex.head_scores.numpy())
    np.testing.assert_allclose(data["tokens"][1]["heatmaps"][0], ex.heatmap(1).numpy())
    assert len(data["token_boxes"][0]) == len(ex.layout.images[0].positions)


def test_safetensors_hold_all_numbers(ex, tmp_path):
    ex.save(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tokens"]) == ex.tokens
        assert (file.get_tensor("attention")[2] == ex.attention(2)).all()
        heads = [tuple(h) for h in file.get_tensor("top_heads")[0].tolist()]
        assert (file.get_tensor("position_scores")[0] == ex.position_scores(0, heads)).all()


def test_page_is_self_contained_and_escaped(ex, tmp_path):
    ex.save(tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "__DATA__" not in page
    assert page.count("<script>") == 1, "the question must not open a script of its own"
    assert not re.search(r"(src|href)=[\"']http", page)
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))
    assert data["question"] == ex.prompt
    assert len(data["tokens"][0]["heads"]) == 10


@pytest.mark.parametrize("name", ["x.gif", "x", "no/such/folder/x.png", "."])
def test_bad_targets(ex, tmp_path, name):
    with pytest.raises(mf.InputError):
        ex.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_no_half_written_file(tmp_path, monkeypatch):
    """A failure while writing leaves the old file and nothing else."""
    target = tmp_path / "x.json"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert target.read_text() == "old"


def test_a_replaced_file_is_freed(tmp_path):
    """Its last reader keeps it, and no descriptor is left behind; pipes and links are not opened."""
    target = tmp_path / "x.json"
    target.write_bytes(b"old" * 1000)
    fresh = tmp_path / "y.json"
    write_whole(fresh, b"first")  # nothing to free
    _wait_for_freeing()
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with target.open("rb") as reader:
        write_whole(target, b"new")
        assert reader.read() == b"old" * 1000
    assert target.read_bytes() == b"new"
    link = tmp_path / "z.json"
    link.symlink_to(target)
    write_whole(link, b"link")
    assert target.read_bytes() == b"new"
    pipe = tmp_path / "p.json"
    os.mkfifo(pipe)
    write_whole(pipe, b"no pipe")  # to open one would wait for its writer
    assert pipe.read_bytes() == b"no pipe"
    _wait_for_freeing()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def _wait_for_freeing():
    for thread in threading.enumerate():
        if thread.name == "mllm-fast-free":
            thread.join()


def test_the_colour_bar_ends_above_the_words(ex, monkeypatch):
    """Also where the picture is wide, so that the maps are lower than the bar may be."""
    ends, mark = [], (255, 0, 255)
    drawn = figure.color_bar
    monkeypatch.setattr(
        figure, "color_bar", lambda sheet, pen, box, top: (ends.append(box[3]), drawn(sheet, pen, box, top))
    )
    monkeypatch.setattr(figure, "colored_text", lambda found, width: Image.new("RGB", (width, 60), mark))
    sheet = np.asarray(figure.draw_token(ex, 0))
    words = np.flatnonzero((sheet == mark).all(-1).any(-1))
    assert len(words) == 60
    assert ends[0] + 7 < words[0]  # half a line of its lowest number
