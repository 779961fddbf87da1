"""Videos in the browser tool, in a real browser. Screenshots are kept in tests/artefacts/, to be looked at."""

from __future__ import annotations

import pytest
import served
from test_serving_ui import ARTEFACTS, ask, browser, playwright, said, shown_map, wait_for_another  # noqa: F401
from waiting import HANG

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE, SAMPLE_VIDEO

QUESTION = "What color is the star at the end?"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = served.Server("--ui", "--model", "clips", cwd=tmp_path_factory.mktemp("ui"))
    yield made
    assert not any("Traceback" in line for line in made.raw), "".join(made.raw)
    made.stop()


@pytest.fixture
def page(browser, server):  # noqa: F811
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    context.set_default_timeout(1000 * HANG)
    made = context.new_page()
    made.goto(server.url)
    yield made
    context.close()


def test_a_video_is_asked_about_and_scrubbed_through(page, tmp_path):
    clips = mf.VLM.from_pretrained("clips")
    ex = clips.explain(mf.Video(SAMPLE_VIDEO), QUESTION)
    page.locator("#video input[type=file]").set_input_files(SAMPLE_VIDEO)
    page.locator("#video .file-preview").wait_for()
    assert ask(page, QUESTION) == ex.text
    best = int(ex.video().shares(0).argmax())
    playwright.expect(page.locator("#meaning")).to_contain_text("of the video's part")
    number = page.locator("#moment input[type=number]")
    assert number.input_value() == str(ex.layout.moments(f"frame:{ex.video().peak(0)[0].frames[0]}")[0])
    page.screenshot(path=ARTEFACTS / "ui-video.png", full_page=True)
    before = shown_map(page)
    other = 0 if best else 1
    number.fill(str(other))
    number.press("Tab")
    wait_for_another(page, before)
    playwright.expect(page.locator("#meaning")).to_contain_text(f"at {other / 2:.2f} s")
    page.locator("#map img").click(position={"x": 100, "y": 100})
    page.locator("#lens table").wait_for()
    page.locator("#check").click()
    playwright.expect(page.locator("#verdict")).to_contain_text("log p falls")


def test_an_image_and_a_video_are_too_much(page):
    page.locator("#video input[type=file]").set_input_files(SAMPLE_VIDEO)
    page.locator("#video .file-preview").wait_for()
    page.locator("#image input[type=file]").set_input_files(SAMPLE)
    page.locator("#image img").wait_for()
    page.locator("#question textarea").fill(QUESTION)
    page.locator("#ask").click()
    playwright.expect(page.locator("#problem")).to_contain_text("Give an image or a video, not both")


def test_what_is_no_video_is_told(page, tmp_path):
    wrong = tmp_path / "wrong.mp4"
    wrong.write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(100))
    page.locator("#video input[type=file]").set_input_files(wrong)
    page.locator("#video .file-preview").wait_for()
    page.locator("#question textarea").fill(QUESTION)
    page.locator("#ask").click()
    playwright.expect(page.locator("#problem")).to_contain_text("damaged or truncated")
