"""The browser tool's pieces of HTML: answers, legends, the words of a patch, and what went wrong."""

from __future__ import annotations

import html

import numpy as np

from ..drawing.heatmap import colors

HINT = "Ask, and the answer is written here word by word."


def answer_html(title: str, text: str, note: str = "", asked: int | None = None) -> str:
    """Return an answer as HTML.

    Args:
        title: Whose answer it is.
        text: The answer.
        note: What is to be said of it in small letters.
        asked: The number of the question; the page is moved to an answer whose number is new.
    """
    number = "" if asked is None else f' data-asked="{asked}"'
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<h3>{html.escape(title)}</h3><p class="said"{number}>{html.escape(text)}</p>{below}'


def told_html(words: str) -> str:
    """Return a paragraph as HTML, or nothing for no words."""
    return f"<p>{html.escape(words)}</p>" if words else ""


def model_html(name: str, layers: int, heads: int, embedded: bool) -> str:
    """Return a sentence about the model that answers as HTML."""
    about = f"<b>{html.escape(name)}</b> answers, a model of {layers} layers with {heads} heads each."
    if embedded:
        about += (
            " It is small, comes with the package, and knows coloured shapes alone:"
            " of a photograph it says nothing that counts."
        )
    return f"<p>{about}</p>"


def legend_html(meaning: str, top: float) -> str:
    """Return the legend of a map as HTML: its colours, their meaning, and the largest value."""
    steps = ", ".join(
        f"rgb({','.join(str(round(one)) for one in colors(np.array(share)))})" for share in np.linspace(0, 1, 9)
    )
    return (
        f'<div class="ramp" role="img" aria-label="colours from dark, 0, to light, {top:.3g}"'
        f' style="background:linear-gradient(to right, {steps})"></div>'
        f'<div class="ends"><span>0</span><span>{html.escape(meaning)}</span><span>{top:.3g}</span></div>'
    )


def patch_html(found: list[tuple[str, list[str]]]) -> str:
    """Return the words of a patch, by layer, as an HTML table."""
    lines = "".join(
        f"<tr><td>{html.escape(layer)}</td><td>{html.escape(', '.join(words))}</td></tr>" for layer, words in found
    )
    return (
        "<p>What this patch stands for before each layer:</p>"
        f"<table><thead><tr><th>layer</th><th>nearest words</th></tr></thead><tbody>{lines}</tbody></table>"
    )
