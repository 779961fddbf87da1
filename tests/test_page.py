"""The page of an explanation in a browser: the words of the patch under the pointer."""

from __future__ import annotations

import shutil

import pytest
from waiting import HANG

from mllm_fast.core.assets import SAMPLE
from mllm_fast.core.errors import InputError

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def saved(shapes, tmp_path_factory):
    ex = shapes.explain(SAMPLE, "Describe the image.")
    path = tmp_path_factory.mktemp("page") / "why.html"
    ex.save(path, patch_words=True)
    return ex, path


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_words_of_a_patch_follow_the_pointer(saved):
    ex, path = saved
    layout = ex.layout.images[0]

    def wanted(row, col, layer):
        token = layout.token_at(8 * col + 4, 8 * row + 4)
        return [word.strip() for word, _ in ex.project(0, layer, position=int(layout.positions[token]), k=3)]

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=1000 * HANG)
        page = browser.new_page()
        failed = []
        page.on("pageerror", lambda error: failed.append(error))
        page.goto(path.as_uri())
        canvas = page.locator("canvas")
        size = canvas.bounding_box()["width"] / 12  # of a patch, on the screen
        lines = page.locator("#lens tr")
        assert page.locator("#patch").is_hidden()
        canvas.hover(position={"x": 7.5 * size, "y": 4.5 * size})
        playwright.expect(page.locator("#place")).to_have_text("Words of the patch in row 5, column 8")
        playwright.expect(lines).to_have_count(7)
        assert lines.nth(3).inner_text().split("\t") == ["3", ", ".join(wanted(4, 7, 3))]
        assert lines.nth(0).inner_text().startswith("embedding")
        assert lines.nth(6).inner_text().split("\t") == ["end", ", ".join(wanted(4, 7, 6))]
        canvas.click(position={"x": 7.5 * size, "y": 4.5 * size})  # keeps it
        canvas.hover(position={"x": 0.5 * size, "y": 0.5 * size})
        playwright.expect(page.locator("#place")).to_have_text("Words of the patch in row 5, column 8")
        page.keyboard.press("ArrowDown")
        playwright.expect(page.locator("#place")).to_have_text("Words of the patch in row 6, column 8")
        assert lines.nth(4).inner_text().split("\t")[1] == ", ".join(wanted(5, 7, 4))
        browser.close()
    assert failed == []


def test_pages_without_words_have_no_panel(saved, tmp_path):
    ex, _ = saved
    ex.save(tmp_path / "plain.html")
    assert '"patches": null' in (tmp_path / "plain.html").read_text()
    with pytest.raises(InputError, match=r"save the explanation as \.html"):
        ex.save(tmp_path / "x.png", patch_words=True)


def test_the_command(run, tmp_path):
    code, _, err = run("explain", "--out", tmp_path / "why.html", "--patch-words")
    assert code == 0, err
    assert '"patches": [{' in (tmp_path / "why.html").read_text()
    code, _, err = run("explain", "--patch-words")
    assert code == 2
    assert "give --out, a .html" in err
