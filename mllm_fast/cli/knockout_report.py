"""Reports of the knockout command: answers side by side and shares of attention, as text, JSON and a chart."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..core.errors import InputError
from ..core.extras import install_command
from ..core.files import check_target, write_whole
from ..drawing.chart_fonts import set_fonts
from ..runtime.answer import Answer

Rows = Sequence[tuple[str, Answer]]
_ENDINGS = (".png", ".svg")
# from Okabe and Ito's palette, which works for colour-blind readers
_COLORS = {
    "system": "#999999",
    "image": "#D55E00",
    "image_separator": "#CC79A7",
    "query": "#0072B2",
    "generated": "#009E73",
}
_STYLES = {"system": ":", "image": "-", "image_separator": ":", "query": "--", "generated": "-."}
_BARS = "▁▂▃▄▅▆▇█"


def check_chart(path: Path) -> None:
    """Raise InputError if no chart can be written to the path, before any work is done."""
    check_target(path, _ENDINGS)
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InputError(f"a chart needs matplotlib: {install_command('viz')}") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def table(rows: Rows) -> Table:
    """Return a table of each configuration's answer and of what its generated tokens attend to.

    For each type of token it has the mean share of attention, and one bar per layer, from the first to the last.
    """
    out = Table.grid(padding=(0, 2))
    out.add_column(justify="right", style="bold")
    out.add_column(overflow="fold")
    for label, said in rows:
        out.add_row("", "")
        out.add_row("knocked out", escape(label))
        out.add_row("answer", escape(said.text))
        if said.attention_share is None:
            out.add_row("attention", "no generated token was read")
            continue
        for i, (name, share) in enumerate(said.attention_share.items()):
            out.add_row(
                "attention" if i == 0 else "", f"{name:15} {float(share.mean()):4.0%}  {_bars(share.mean(1).tolist())}"
            )
    return out


def _bars(values: list[float]) -> str:
    """Return one character per layer: a dot is no attention, a full block is all of it."""
    return "".join(_BARS[min(len(_BARS) - 1, int(value * len(_BARS)))] if value > 0.005 else "·" for value in values)


def summary(rows: Rows, prompt: str, saved: Path | None, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return all results, ready for JSON. The shares of attention are lists [layers][heads]."""
    answers: list[dict[str, Any]] = [
        {
            "knocked_out": label,
            "answer": said.text,
            "tokens": said.tokens,
            "attention_share": _lists(said.attention_share),
            "unreached_layers": list(said.unreached_layers),
        }
        for label, said in rows
    ]
    return {
        "question": prompt,
        "answers": answers,
        "saved": None if saved is None else str(saved),
        "provenance": provenance,
    }


def _lists(share: dict[str, Tensor] | None) -> dict[str, list] | None:
    return None if share is None else {name: values.tolist() for name, values in share.items()}


def save(rows: Rows, prompt: str, path: Path, provenance: dict[str, Any]) -> None:
    """Save a chart with one panel for each configuration.

    A panel shows the share of attention of each type of token over the layers. The line is the mean over heads, and
    the shaded area reaches from the first to the third quartile of the heads.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, len(rows), figsize=(max(6.0, 3.6 * len(rows)), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (label, said) in zip(panels[0], rows, strict=True):
        answer = said.text if len(said.text) <= 60 else said.text[:59] + "…"
        panel.set_title(f"knocked out: {label}\n{_wrapped(answer)}", fontsize=9)
        panel.set_xlabel("layer")
        panel.grid(alpha=0.25)
        panel.set_ylim(0, 1)
        if said.attention_share is None:
            panel.text(0.5, 0.5, "no generated token\nwas read", ha="center", va="center", transform=panel.transAxes)
            continue
        layers = range(len(said.attention_share["image"]))
        panel.set_xticks([n for n in layers if n % max(1, len(layers) // 8) == 0])
        for name, share in ((name, share.double()) for name, share in said.attention_share.items()):
            low, high = share.quantile(0.25, 1), share.quantile(0.75, 1)
            panel.plot(layers, share.mean(1).tolist(), _STYLES[name], color=_COLORS[name], label=name, linewidth=1.8)
            panel.fill_between(layers, low.tolist(), high.tolist(), color=_COLORS[name], alpha=0.15, linewidth=0)
    panels[0, 0].set_ylabel("share of generated tokens' attention", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(prompt, fontsize=11)
    set_fonts(figure)
    buffer = io.BytesIO()
    kind = path.suffix[1:].lower()
    made = f"mllm-fast {provenance['versions'].get('mllm-fast', '')}".strip()
    about = json.dumps(provenance, ensure_ascii=False)
    notes: dict[str, Any] = {"Software": made, "mllm_fast.provenance": about}
    if kind == "svg":  # which knows Dublin Core's names alone
        notes = {"Creator": made, "Description": about}
    figure.savefig(buffer, format=kind, dpi=130, metadata=notes)
    plt.close(figure)
    write_whole(path, buffer.getvalue())


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(f"\u201c{text}\u201d", 36))
