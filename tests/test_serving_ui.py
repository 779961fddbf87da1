"""The tool in the browser, in a real one: Chromium without a screen, driven by Playwright. Screenshots are kept in
tests/artefacts/, to be looked at."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import served
from PIL import Image
from served import KEY
from waiting import HANG

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE
from mllm_fast.joint import JointModel

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
    refused: list[str] = []
    made.on("response", lambda one: refused.append(one.url) if one.status >= 400 else None)
    made.goto(server.url)  # leads to the tool
    made.locator("#image input[type=file]").set_input_files(SAMPLE)
    made.locator("#image img").wait_for()
    yield made
    context.close()
    assert strangers == []
    assert refused == []


def ask(page, question: str = QUESTION) -> str:
    """The whole answer of a question, once the page has done with it; what went wrong is told at once."""
    state = """() => [document.querySelector('#answer .said')?.dataset.asked ?? null,
      document.querySelector('#problem p')?.textContent ?? '']"""
    before = page.evaluate(state)
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    done = f"""([number, problem]) => {{
      const [asked, wrong] = ({state})(), seen = (id) => document.querySelector(id)?.checkVisibility();
      const whole = asked !== number && seen('#heads label') && !seen('#stop') && !seen('#status p');
      return whole || wrong && wrong !== problem;
    }}"""
    try:
        page.wait_for_function(done, arg=before)
    except playwright.TimeoutError as error:
        page.screenshot(path=ARTEFACTS / "ui-no-answer.png", full_page=True)
        raise AssertionError(f"the page shows no answer:\n{page.locator('body').inner_text()}") from error
    assert page.evaluate(state)[1] == ""
    return said(page)


def said(page, where: str = "answer") -> str:
    return page.locator(f"#{where} .said").inner_text()


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
    page.locator("#other .said").wait_for()
    page.locator("#small .said").wait_for()
    page.locator("#kept img").wait_for()
    assert said(page, "other") == blind != "blue"
    assert said(page, "small") == shapes.compress(picture, 0.1).ask(QUESTION).text
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


def test_the_kept_patches_are_those_of_the_model_that_answers(page, server):
    at(page, f"{server.url}/ui/?question=Describe+the+image.&keep=5&joint=1&image=sample")
    page.locator("#image img").wait_for()
    page.locator("#ask").click()
    page.locator("#small .said").wait_for()
    picture = Image.open(SAMPLE).convert("RGB")
    both = JointModel.from_pretrained("shapes", device="cpu")
    own = both.vlm.compress(picture, 0.05).ask("Describe the image.").text
    assert said(page, "small") == both.compress(picture, 0.05).ask("Describe the image.").text != own


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
    for place in ("#heads", "#layer"):  # this method has nothing to choose there, and says so
        playwright.expect(page.locator(place)).to_contain_text("rollout has one map for all heads and layers")
        playwright.expect(page.locator(f"{place} input").first).to_be_disabled()
    page.locator("#tokens label").nth(1).click()
    wait_for_another(page, before)
    playwright.expect(verdict).to_have_text("")


def test_the_keyboard_passes_the_sliders_by(page):
    """Gradio reports a slider whose number the keyboard leaves as one that was moved."""
    ask(page)
    before = shown_map(page)
    page.locator("#heads label").nth(1).click()
    wait_for_another(page, before)
    page.locator("#layer input[type=number]").focus()
    page.keyboard.press("Tab")
    page.locator("#check").click()
    playwright.expect(page.locator("#verdict")).to_contain_text("log-probability map of head")
    playwright.expect(page.locator("#heads input").nth(1)).to_be_checked()


def test_the_keyboard_reaches_everything(page):
    """Ask with Enter; words are one stop of Tab, and so are heads, and arrows go between them. All have names."""
    page.locator("#question textarea").fill("Describe the image.")
    page.locator("#question textarea").press("Enter")
    page.locator("#heads label").first.wait_for()
    words, before = page.locator("#tokens input"), shown_map(page)
    last = words.count() - 1
    words.nth(last).focus()
    for key, word in (("ArrowLeft", last - 1), ("ArrowLeft", last - 2), ("ArrowRight", last - 1)):
        page.keyboard.press(key)
        before = wait_for_another(page, before)
        playwright.expect(words.nth(word)).to_be_checked()
        playwright.expect(words.nth(word)).to_be_focused()
    page.locator("#heads input").first.focus()
    page.keyboard.press("ArrowRight")
    wait_for_another(page, before)
    playwright.expect(page.locator("#meaning")).to_contain_text("through head")
    stops = []
    page.locator("#question textarea").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.closest('[id]:not([id^=component]):not([id^=range])')?.id"))
    assert {"ask", "share", "tokens", "layer", "heads", "check", "report", "numbers"} <= set(stops)
    assert stops.count("tokens") == stops.count("heads") == 1, " ".join(map(str, stops))
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "textbox",
        "slider",
        "spinbutton",
        "checkbox",
        "radio",
        "combobox",
        "radiogroup",
        "group",
        "link",
    }
    controls = [one for one in tree if not one["ignored"] and one["role"]["value"] in roles]
    assert len(controls) > 40
    assert [one["role"] for one in controls if not one["name"]["value"].strip()] == []


def test_a_telephones_width(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 800}, is_mobile=True, has_touch=True)
    context.set_default_timeout(1000 * HANG)
    page = context.new_page()
    page.goto(f"{server.url}/ui")
    page.locator("#sample").tap()
    page.locator("#image img").wait_for()
    page.locator("#ask").tap()
    page.locator("#heads label").first.wait_for()
    assert said(page) == "blue"
    page.wait_for_function("Math.abs(document.querySelector('#answer').getBoundingClientRect().top) < 100")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=ARTEFACTS / "ui-telephone.png", full_page=True)
    context.close()


def test_wrong_input_is_told_beside_the_button_and_nothing_is_lost(page):
    problem = page.locator("#problem")
    ask(page)
    before = shown_map(page)
    for question, words in (
        (" ", "Ask something about the image."),
        ("what is red ? " * 1000, "the model's window is"),
    ):
        page.locator("#question textarea").fill(question)
        page.locator("#ask").click()
        playwright.expect(problem).to_contain_text(words)
        assert problem.get_attribute("role") == "alert"
        assert (said(page), shown_map(page)) == ("blue", before)
        playwright.expect(page.locator("#heads label")).to_have_count(11)
    page.screenshot(path=ARTEFACTS / "ui-problem.png", full_page=True)
    ask(page, "Describe the image.")
    playwright.expect(problem).to_have_text("")


def at(page, link: str) -> None:
    """Open a link to the tool, and wait until it has been looked at."""
    page.goto(link)
    page.wait_for_function("document.querySelector('#notice p, #problem p')")


def test_a_link_fills_the_controls(page, server):
    """Also with a word and a method, which the next answer shows; what does not fit is refused in words."""
    ask(page, "Describe the image.")
    before = shown_map(page)
    page.locator("#tokens label").nth(1).click()
    before = wait_for_another(page, before)
    page.locator("#method input").click()
    page.get_by_role("option", name="attention rollout").click()
    wait_for_another(page, before)
    page.locator("#share").click()
    playwright.expect(page.locator("#link textarea")).to_have_value(re.compile(r"[?]question="))
    link = page.locator("#link textarea").input_value()
    assert link.partition("?")[2] == "question=Describe+the+image.&method=rollout&word=1&image=sample"
    at(page, f"{link}&knockout=image+to+answer&first=2&temperature=0.5&top_p=0.9&tokens=9&joint=1")
    assert page.locator("#question textarea").input_value() == "Describe the image."
    page.locator("#image img").wait_for()
    page.locator("#ask").click()
    page.locator("#other .said").wait_for()
    playwright.expect(page.locator("#tokens label")).to_have_count(9)
    playwright.expect(page.locator("#tokens input").nth(1)).to_be_checked()
    playwright.expect(page.locator("#meaning")).to_contain_text("attention rollout")
    assert "cut off after 9 tokens" in page.locator("#answer .note").inner_text()
    for control, value in (("#heat", "0.5"), ("#top-p", "0.9")):
        page.locator("#answering button").first.click() if control == "#heat" else None
        playwright.expect(page.locator(f"{control} input[type=number]")).to_have_value(value)
    at(page, f"{server.url}/ui/?question=What%3F&last=77")
    playwright.expect(page.locator("#problem")).to_contain_text("a whole number from 0 to 5, got '77'")
    assert page.locator("#question textarea").input_value() == "Describe the image."  # what the page begins with


def test_a_reload_brings_the_question_back(page):
    ask(page, "Is there a ring?")
    page.reload()
    playwright.expect(page.locator("#notice")).to_contain_text("Your last question is back: press Ask again.")
    page.locator("#image img").wait_for()
    page.get_by_role("button", name="Ask again").click()
    page.locator("#heads label").first.wait_for()
    assert said(page) == "yes"
    page.reload()
    page.get_by_role("button", name="Forget it").click()
    page.wait_for_function(
        "!Object.keys(localStorage).concat(Object.keys(sessionStorage)).some(one => /^mllm/.test(one))"
    )


def test_stop_and_a_server_that_goes_and_comes_back(browser, tmp_path):
    """What was said until the stop is explained; a lost server is told in words, and the page finds it again."""
    endless = served.endless(tmp_path / "endless")
    options = ("--ui", "--model", endless, "--served-name", "endless", "--grace", 3, *served.SLOW)
    server = served.Server(*options, cwd=tmp_path)
    page = browser.new_page()
    page.set_default_timeout(1000 * HANG)
    try:
        page.goto(server.url)
        playwright.expect(page.locator("#model")).to_have_text(
            "endless answers, a model of 6 layers with 4 heads each."
        )
        page.locator("#sample").click()
        page.locator("#image img").wait_for()
        page.locator("#ask").click()
        page.locator("#answer .said[data-asked]").wait_for()
        page.locator("#stop").click()
        playwright.expect(page.locator("#answer .note")).to_have_text("stopped")
        playwright.expect(page.locator("#stop")).to_be_hidden()
        words = page.locator("#tokens label").count()
        assert 1 <= words < 256
        page.locator("#heads label").first.wait_for()
        server.stop()
        page.locator("#ask").click()
        playwright.expect(page.locator("#problem")).to_contain_text("The server does not answer")
        assert page.locator("#tokens label").count() == words
        assert said(page).startswith("blue")
        server = served.Server(*options, "--port", server.port, cwd=tmp_path)
        playwright.expect(page.locator("#notice")).to_contain_text("Your last question is back: press Ask again.")
        page.locator("#image img").wait_for()
        assert page.locator("#question textarea").input_value() == "What color is the star?"
    finally:
        page.close()
        server.stop()


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
