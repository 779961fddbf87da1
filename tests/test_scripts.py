"""Words of all scripts: joined from tokens, and drawn with fonts that have their letters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont, features
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm_fast.core.assets import SAMPLE
from mllm_fast.core.errors import InputError
from mllm_fast.drawing import fonts
from mllm_fast.drawing.bidi import levels_of
from mllm_fast.drawing.text import INK, PAPER, Text, _clusters, put_text, shorten, text_width
from mllm_fast.explain.scores import labels_of
from mllm_fast.runtime.detokenizer import Detokenizer, token_texts
from mllm_fast.runtime.token_bytes import TokenBytes

SCRIPTS = {
    "Latin": "a naïve façade, œuvre",
    "Cyrillic": "Звезда синяя",
    "Greek": "Το αστέρι είναι μπλε",
    "Chinese": "星星是蓝色的，旁边有一个圆圈。",
    "Japanese": "星は青いです。カタカナ",
    "Korean": "별은 파란색입니다",
    "Hindi": "तारा नीला है, क्षेत्र",
    "Arabic": "النجمة زرقاء (12.5) وبجانبها circle",
    "Hebrew": "הכוכב כחול, abc 42",
    "Vietnamese": "Ngôi sao màu xanh lam, tiếng Việt",
    "emoji": "⭐ 😀 👩‍👩‍👧 👍🏽 ❤️",
}


def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [text[: len(text) // 2] for text in SCRIPTS.values()] * 3  # half of the letters stay in pieces
    inner.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: spaces are U+2581, and a letter that is no piece is written as its bytes."""
    pieces = ["<unk>", *(f"<0x{one:02X}>" for one in range(256)), "\u2581", "\u2581a", *"abcdefghijklmno星はअ"]
    inner = Tokenizer(models.BPE({one: i for i, one in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TOKENIZERS = {"bytes": byte_level(), "pieces": byte_fallback()}


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_tokens_join_to_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in one for one in texts)
    for cut in range(len(ids)):  # an answer may end within a character
        joined = "".join(token_texts(tokenizer, ids[:cut]))
        assert text.startswith(joined.rstrip("\ufffd"))
        if tokenizer is TOKENIZERS["bytes"]:  # of pieces, decoding would lose letters before the one that is cut
            assert joined == tokenizer.decode(ids[:cut])


@settings(max_examples=150)
@given(st.lists(st.integers(0, 256), max_size=12))
def test_bytes_that_are_no_text_end_no_stream(ids):
    for tokenizer in TOKENIZERS.values():
        some = [i % len(tokenizer) for i in ids]
        words = Detokenizer(tokenizer)
        joined = "".join([words.push(one) for one in some] + [words.finish()])
        assert joined == tokenizer.decode(some) or tokenizer is TOKENIZERS["pieces"]


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_a_token_by_itself_shows_its_spaces_and_bytes(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = TokenBytes(tokenizer)
    assert b"".join(found(one) for one in ids).decode().strip() == text
    for one in ids:
        shown = found.text(one)
        assert "\ufffd" not in shown
        try:
            assert shown == found(one).decode()
        except UnicodeDecodeError:
            assert "<0x" in shown


def test_labels_of_parts_of_letters(shapes):
    words = {0: "<0xE6>", 2: "\n", 3: " "}
    assert labels_of(["", "星", "\n", " "], [0, 1, 2, 3], words.get) == ["<0xE6>", "星", "↵", "␣"]
    ex = shapes.explain(SAMPLE, "What color is the star?", "blue")
    ex.labels, ex.tokens = ["<0xE6>", "星"], ["", "星"]
    assert [ex.token_index(one) for one in ("<0xE6>", "星")] == [0, 1]
    with pytest.raises(InputError, match="0: '<0xE6>', 1: '星'"):
        ex.token_index("x")


# the order from left to right, as ICU and FriBiDi give it
ORDERS = {
    "abc אבג": "abc גבא",
    "אבג abc": "abc גבא",
    "אב 12 גד": "דג 12 בא",
    "אב 12.5% גד": "דג 12.5% בא",
    "a אב 1 b": "a 1 בא b",
    "א (ב) a": "a )ב( א",
    "ن 12.5 ج": "ج 12.5 ن",
    "ن 1-2 a": "a 2-1 ن",
    "12 אב": "בא 12",
    "a, אב, b": "a, בא, b",
}


@pytest.mark.parametrize("text", ORDERS)
def test_the_order_of_letters_from_both_sides(text):
    placed = list(zip(text, levels_of(text), strict=True))
    for level in (2, 1):  # rule L2
        start = 0
        while start < len(placed):
            end = start
            while end < len(placed) and placed[end][1] >= level:
                end += 1
            placed[start:end] = reversed(placed[start:end])
            start = end + 1
    assert "".join(one for one, _ in placed) == ORDERS[text]


def drawn(text: str, size: int = 20) -> np.ndarray:
    sheet = Image.new("RGB", (700, 40), PAPER)
    put_text(sheet, (4, 4), text, size, INK)
    return np.asarray(sheet)


DEJAVU = {"Cyrillic": "Звезда", "Greek": "αστέρι", "Vietnamese": "Việt", "Hebrew": "הכוכב", "Arabic": "النجمة"}


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow writes from right to left by libraqm alone")
@pytest.mark.parametrize("text", DEJAVU.values(), ids=DEJAVU)
def test_letters_come_from_a_font_that_has_them(text, monkeypatch):
    """Pixel for pixel as Pillow draws the whole word in DejaVu Sans, which matplotlib brings."""
    matplotlib = pytest.importorskip("matplotlib")
    path = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    monkeypatch.setattr(fonts, "_FOUND", [fonts.Face(path)])
    if text == DEJAVU["Vietnamese"]:
        monkeypatch.setattr(fonts.default_face(), "letters", frozenset(map(ord, "Vit")))
    sheet = Image.new("RGB", (700, 40), PAPER)
    baseline = 4 + fonts.default_face().at(20, shaped=False).getmetrics()[0]
    face = ImageFont.truetype(path, 20, layout_engine=ImageFont.Layout.RAQM)
    ImageDraw.Draw(sheet).text((4, baseline), text, font=face, fill=INK, anchor="ls")
    assert np.array_equal(drawn(text), np.asarray(sheet))
    assert np.any(drawn(text) < 100)


@pytest.mark.parametrize("text", ["星", "का", "별", "😀", "\U00013000", "ا"])
def test_a_letter_that_no_font_has_is_its_code_point(text, monkeypatch):
    monkeypatch.setattr(fonts, "_FOUND", [])
    monkeypatch.setattr(fonts, "_of_system", lambda wanted: None)
    small = Image.new("RGB", (700, 40), PAPER)
    own = fonts.default_face()
    named = "".join(f" U+{ord(one):04X} " for one in text)
    place = (4, 4 + own.at(20, shaped=False).getmetrics()[0])
    ImageDraw.Draw(small).text(place, named, font=own.at(15, shaped=False), fill=INK, anchor="ls")
    assert np.array_equal(drawn(text), np.asarray(small))


SQUARES = """
from PIL import Image
import numpy as np
from mllm_fast.drawing.text import put_text, text_width
for letter in LETTERS:
    sheet = Image.new("RGB", (60, 40), "white")
    put_text(sheet, (4, 4), letter, 20, (0, 0, 0))
    dark = np.asarray(sheet)[..., 0] < 128
    print(f"{ord(letter):x}", text_width(letter, 20), int(dark.sum()))
"""


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="fontconfig is not installed")
def test_fonts_are_found_through_fontconfig(tmp_path):
    """A font of the user's, in which each letter is a black square."""
    letters = "星별क😀ж"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    made = FontBuilder(1000)
    names = [".notdef", *(f"u{ord(one):X}" for one in letters)]
    made.setupGlyphOrder(names)
    made.setupCharacterMap({ord(one): f"u{ord(one):X}" for one in letters})
    made.setupGlyf(dict.fromkeys(names, square))
    made.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    made.setupHorizontalHeader(ascent=1000, descent=0)
    made.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    made.setupOS2()
    made.setupPost()
    made.save(tmp_path / "squares.ttf")
    (tmp_path / "fonts.conf").write_text(
        f'<?xml version="1.0"?><fontconfig><dir>{tmp_path}</dir><cachedir>{tmp_path}/cache</cachedir></fontconfig>'
    )
    found = subprocess.run(
        [sys.executable, "-c", f"LETTERS = {letters!r}\n{SQUARES}"],
        env=os.environ | {"FONTCONFIG_FILE": str(tmp_path / "fonts.conf"), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert found[:-1] == [f"{ord(one):x} 20.0 400" for one in letters]


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="ab cd.星は\u0301é😀אب1", max_size=60), st.integers(40, 200))
def test_lines_hold_the_whole_text_and_fit(text, width):
    lines = Text(width).wrap(text, 16, INK)
    joined = "".join(one.text for one in lines)
    assert joined.replace(" ", "") == "".join(text.split())
    assert all(text_width(one.text, 16) <= width or len(list(_clusters(one.text))) == 1 for one in lines)
    cut = shorten(text, 16, width)
    assert cut == text or (cut.endswith("…") and text.startswith(cut[:-1]))


def test_charts_have_the_letters(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from mllm_fast.drawing.chart_fonts import set_fonts

    monkeypatch.setattr(fonts, "_FOUND", [])
    monkeypatch.setattr(fonts, "_of_system", lambda wanted: None)
    figure = Figure()
    text, plain = figure.text(0, 0, "a 星"), figure.text(0, 0, "Звезда")
    set_fonts(figure)
    assert (text.get_text(), plain.get_text()) == ("a U+661F", "Звезда")
    figure.savefig(tmp_path / "chart.png")  # a missing letter would be a warning, which is an error here
