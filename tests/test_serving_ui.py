"""The tool in the browser, in a real one: Chromium without a screen, driven by Playwright. Screenshots are kept in
tests/artefacts/, to be looked at."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import served
from PIL import Image
from served import KEY
from waiting import HANG

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARTEFACTS = Path(__file__).parent / "artefacts"
QUESTION = "What color is the star?"

if CHROMIUM is None and not os.environ.get("MLLM_FAST_NEED_BROWSER"):
    pytest.skip("there is no Chromium here: install Debian's package chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = served.Server("--ui", "--joint", "shapes", cwd=tmp_path_factory.mktemp("ui"))
    yield made
    assert not any("Traceback" in line for line in made.raw), "".join(made.raw)
    made.stop()


@pytest.fixture(scope="module")
def browser():
    ARTEFACTS.mkdir(exist_ok=True)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=1000 * HANG)
        playwright.expect.set_options(timeout=1000 * HANG)
        yield made
        made.close()


@pytest.fixture
def page(browser, server):
    """A page with the sample image uploaded and a question asked. Nothing but the server is called."""
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    context.set_default_timeout(1000 * HANG)
    made = context.new_page()
    strangers: list[str] = []
    made.on(
        "request",
        lambda one: strangers.append(one.url) if not one.url.startswith((server.url, "data:", "blob:")) else None,
    )
    made.goto(server.url)  # leads to the tool
    made.locator("#image input[type=file]").set_input_files(SAMPLE)
    made.locator("#image img").wait_for()
    yield made
    context.close()
    assert strangers == []


def ask(page, question: str = QUESTION) -> str:
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    page.locator("#heads label").first.wait_for()
    return page.locator("#answer textarea").input_value()


def shown_map(page) -> str:
    return page.locator("#map img").get_attribute("src")


def wait_for_another(page, before: str) -> str:
    page.wait_for_function("before => document.querySelector('#map img')?.getAttribute('src') !== before", arg=before)
    return shown_map(page)


def test_upload_ask_and_look_at_a_word_and_a_head(page, shapes):
    picture = Image.open(SAMPLE).convert("RGB")
    ex = shapes.explain(picture, "Describe the image.")
    assert ask(page, "Describe the image.") == ex.text
    words = page.locator("#tokens label")
    assert [word.inner_text().strip() for word in words.all()] == [token.strip() for token in ex.tokens]
    page.screenshot(path=ARTEFACTS / "ui-answer.png", full_page=True)
    maps = [shown_map(page)]
    words.nth(1).click()  # another word
    maps.append(wait_for_another(page, maps[-1]))
    layer, head, score = ex.top_heads(1)[0]
    best = page.locator("#heads label").nth(1)
    playwright.expect(best).to_contain_text(f"layer {layer}, head {head}: {score:+.2f}")
    best.click()  # one head of it
    maps.append(wait_for_another(page, maps[-1]))
    playwright.expect(page.locator("#meaning")).to_contain_text(f"through head {head} of layer {layer}")
    number = page.locator("#layer input[type=number]")  # all heads of a layer
    number.fill("2")
    number.press("Tab")
    maps.append(wait_for_another(page, maps[-1]))
    assert len(set(maps)) == 4
    page.screenshot(path=ARTEFACTS / "ui-layer.png", full_page=True)


def test_a_click_on_a_patch_shows_its_words(page, shapes):
    """Those of `Explanation.project` at the patch's position; a new question forgets them."""
    ask(page)
    shown = page.locator("#map img")
    box = shown.bounding_box()
    side = 96 / box["width"]  # the sample image has 96 x 96 pixels
    ex = shapes.explain(Image.open(SAMPLE).convert("RGB"), QUESTION)
    token = ex.layout.images[0].token_at(0.3 * 96, 0.55 * 96)
    position = int(ex.layout.images[0].positions[token])
    shown.click(position={"x": 0.3 * 96 / side, "y": 0.55 * 96 / side})
    lens = page.locator("#lens tbody tr")
    playwright.expect(lens).to_have_count(7)
    words = [word.strip() for word, _ in ex.project(0, 3, position=position, k=5)]
    playwright.expect(lens.nth(3)).to_have_text(f"3{', '.join(words)}")
    page.screenshot(path=ARTEFACTS / "ui-patch.png", full_page=True)
    ask(page, "What color is the star?")
    playwright.expect(lens).to_have_count(0)


def test_knock_out_the_image_and_keep_a_few_patches(page, shapes):
    picture = Image.open(SAMPLE).convert("RGB")
    page.locator("#knockout button").click()
    for route in ("image to question", "image to answer"):
        page.get_by_label(route).check()
    page.locator("#compression button").click()
    number = page.locator("#keep input[type=number]")
    playwright.expect(number).to_have_value("0")
    number.click()  # waits two frames: Gradio sets what a newly opened accordion holds once more, one frame later
    number.fill("10")
    number.press("Tab")
    playwright.expect(page.locator("#keep input[type=range]")).to_have_value("10")
    assert ask(page) == shapes.generate(picture, QUESTION).text == "blue"
    blind = shapes.generate(picture, QUESTION, knockout=mf.Knockout("image", "query+generated")).text
    other = page.locator("#other textarea")
    other.wait_for()
    page.locator("#small textarea").wait_for()
    page.locator("#kept img").wait_for()
    assert other.input_value() == blind != "blue"
    assert page.locator("#small textarea").input_value() == shapes.compress(picture, 0.1).ask(QUESTION).text
    playwright.expect(page.locator("#small")).to_contain_text("15 of 144 image tokens a layer")
    page.screenshot(path=ARTEFACTS / "ui-knockout.png", full_page=True)


def test_boxes_of_the_joint_model(page):
    page.get_by_label("Answer through the joint model").check()
    assert ask(page) == "blue"
    before = shown_map(page)
    page.locator("#method input").click()
    page.get_by_role("option", name="gradient alignment").click()
    wait_for_another(page, before)
    playwright.expect(page.locator("#meaning")).to_contain_text("the detector looks for “a photo of a blue”")
    page.screenshot(path=ARTEFACTS / "ui-boxes.png", full_page=True)


def test_check_and_downloads(page):
    ask(page)
    page.locator("#check").click()
    playwright.expect(page.locator("#verdict")).to_contain_text("holds")
    with page.expect_download() as download:
        page.locator("#report").click()
    assert download.value.suggested_filename == "explanation.html"
    assert b"<!" in Path(download.value.path()).read_bytes()[:20]


def test_a_verdict_goes_with_its_map(page):
    """Another map or word has no verdict until it is checked, and then its own."""
    ask(page, "Describe the image.")
    page.locator("#check").click()
    verdict = page.locator("#verdict")
    playwright.expect(verdict).to_contain_text("log-probability map of the 10 best heads")
    before = shown_map(page)
    page.locator("#method input").click()
    page.get_by_role("option", name="attention rollout").click()
    before = wait_for_another(page, before)
    playwright.expect(verdict).to_have_text("")
    page.locator("#check").click()
    playwright.expect(verdict).to_contain_text("map 'rollout'")
    page.screenshot(path=ARTEFACTS / "ui-verdict.png", full_page=True)
    page.locator("#tokens label").nth(1).click()
    wait_for_another(page, before)
    playwright.expect(verdict).to_have_text("")


def test_the_keyboard_reaches_everything(page):
    """Ask with Enter, and take another word with the space bar; Tab leads to everything that can be chosen."""
    page.locator("#question textarea").fill("Describe the image.")
    page.locator("#question textarea").press("Enter")
    page.locator("#heads label").first.wait_for()
    before = shown_map(page)
    page.locator("#tokens input[type=radio]").nth(1).focus()
    page.keyboard.press("Space")
    wait_for_another(page, before)
    reached = set()
    page.locator("#question textarea").focus()
    for _ in range(80):  # each word and each head is a stop
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]:not([id^=component])')?.id"))
    assert {"ask", "sample", "tokens", "layer", "heads", "check", "report", "numbers"} <= reached


def test_a_telephones_width(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 800}, is_mobile=True, has_touch=True)
    context.set_default_timeout(1000 * HANG)
    page = context.new_page()
    page.goto(f"{server.url}/ui")
    page.locator("#sample").tap()
    page.locator("#image img").wait_for()
    page.locator("#ask").tap()
    page.locator("#heads label").first.wait_for()
    assert page.locator("#answer textarea").input_value() == "blue"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=ARTEFACTS / "ui-telephone.png", full_page=True)
    context.close()


def test_wrong_input_is_told(page, tmp_path):
    page.locator("#question textarea").fill(" ")
    page.locator("#ask").click()
    playwright.expect(page.get_by_text("Ask something about the image.")).to_be_visible()
    page.locator("#question textarea").fill("what is red ? " * 1000)
    page.locator("#ask").click()
    playwright.expect(page.get_by_text("the model's window is")).to_be_visible()


def test_keys_are_asked_for(browser, tmp_path):
    (tmp_path / "keys").write_text(KEY)
    server = served.Server("--ui", "--api-keys", tmp_path / "keys", cwd=tmp_path)
    try:
        page = browser.new_page()
        page.set_default_timeout(1000 * HANG)
        page.goto(server.url)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name="Login").click()
        playwright.expect(page.get_by_text("Incorrect")).to_be_visible()
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill(KEY)
        page.get_by_role("button", name="Login").click()
        page.locator("#ask").wait_for()
        page.close()
        assert KEY not in "".join(server.raw)
    finally:
        server.stop()
