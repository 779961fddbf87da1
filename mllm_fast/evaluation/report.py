"""Reports made of sentences, tables and charts, written as one HTML page, as Markdown and as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.extras import install_command
from ..core.files import write_whole
from ..drawing.chart_fonts import set_fonts
from ..models.provenance import as_text, now, versions

# from the palette of Okabe and Ito, which people with colour blindness can tell apart
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_NUMBER = re.compile(r"[+\-−]?(\d|$)")  # a lone dash, for a missing number, matches too
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem"
    ";color:#1a1a1a;background:#fff}"
    "h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.5rem;border-top:1px solid #ccc;padding-top:1rem}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "caption{text-align:left;font-weight:600;padding-bottom:.3rem}"
    "th,td{padding:.25rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}"
    ".number{text-align:right}th,td:not(:last-child),.number{white-space:nowrap}"
    "figure{margin:1rem 0}figure img{max-width:100%;height:auto}figcaption,.note{color:#555;font-size:.9rem}"
    ".wide{overflow-x:auto}"
)


def check_charts() -> None:
    """Raise InputError if no chart can be drawn. Call it before any work is done for a chart."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(f"a chart needs matplotlib: {install_command('viz')}") from None


@dataclass(frozen=True)
class Table:
    """A table of a report. All cells are text, with numbers as they are to be shown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def numeric(self, column: int) -> bool:
        """Return whether all cells of a column are numbers, which are aligned to the right."""
        return all(_NUMBER.match(row[column]) for row in self.rows)


@dataclass(frozen=True)
class Chart:
    """A chart of a report.

    Attributes:
        name: The name of the file, without the ending.
        draw: A function that draws into a matplotlib Figure.
        caption: A description of the chart, also for readers who cannot see it.
        size: The width and height in inches.
    """

    name: str
    draw: Callable[[Any], None]
    caption: str
    size: tuple[float, float] = (8.5, 4.4)

    def png(self) -> bytes:
        """Return the chart as a PNG. Raises InputError without matplotlib."""
        check_charts()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        set_fonts(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


@dataclass(frozen=True)
class Report:
    """What one evaluation found.

    Attributes:
        name: The name of the evaluation.
        title: The title of the report.
        says: The findings, as sentences.
        tables: The tables.
        charts: The charts.
        figures: The numbers, as plain JSON.
        failed: The reason why each sample that could not be used gave no rows.
        files: The text of each file that is saved beside the report, by name.
    """

    name: str
    title: str
    says: Sequence[str]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    figures: dict[str, Any]
    failed: dict[str, str] = field(default_factory=dict)  # sample -> why it gave no row
    files: dict[str, str] = field(default_factory=dict)  # name -> text, saved beside it


def noted(report: Report, notes: Sequence[str]) -> Report:
    """Return a report that also says what was odd about the files that its samples come from."""
    return replace(report, says=[*report.says, *notes])


def save(report: Report, folder: Path, settings: dict[str, Any], made: dict[str, Any] | None = None) -> list[Path]:
    """Write report.html, report.md, figures.json, the charts and the report's own files.

    Each file appears only once it is complete. One of the report's own files (labels.csv) that is there with other
    content is kept, and the new one is written beside it (labels.new.csv).

    Args:
        report: The report.
        folder: The folder.
        settings: The settings of the evaluation.
        made: What it was made with: the model, dtype, device, versions and date; by default the last two.

    Returns:
        The paths of the files.
    """
    made = made or {"versions": versions(), "date": now()}
    charts = {f"{chart.name}.png": chart.png() for chart in report.charts}
    page = to_html([(report, settings)], report.title, made)
    figures = {"settings": settings, "provenance": made, **plain(report.figures)}
    content = {
        "figures.json": (json.dumps(figures, indent=1) + "\n").encode(),
        "report.md": (to_markdown(report) + f"\nMade with: {as_text(made)}.\n").encode(),
        **charts,
        **{name: text.encode() for name, text in report.files.items()},
        "report.html": page.encode(),
    }
    for name in report.files:  # somebody may have edited it
        if (folder / name).exists() and (folder / name).read_bytes() != content[name]:
            content[f"{Path(name).stem}.new{Path(name).suffix}"] = content.pop(name)
    for name, data in content.items():
        write_whole(folder / name, data)
    return [folder / name for name in content]


def plain(value: Any) -> Any:
    """Replace NaN by None in a nested value, since JSON has no NaN."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def cell(value: tuple[float, float], digits: int = 2, times: float = 1.0) -> str:
    """Format a mean and its standard error as "mean ± error".

    Args:
        value: The mean and the standard error. An error that is NaN is left out; a mean that is NaN gives "-".
        digits: The number of decimal places.
        times: A factor for both numbers.
    """
    mean, error = (times * one for one in value)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def to_markdown(report: Report) -> str:
    """Return the sentences and the tables of a report as Markdown."""
    lines = [f"# {report.title}", "", *report.says, ""]
    for table in report.tables:
        lines += [f"**{table.title}**", "", _line(table.columns), _line(_rules(table))]
        lines += [_line(row) for row in table.rows]
        lines += ["", table.note, ""] if table.note else [""]
    if report.failed:
        lines += [_failures(report), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rules(table: Table) -> list[str]:
    return ["---:" if table.numeric(i) else "---" for i in range(len(table.columns))]


def _failures(report: Report) -> str:
    first = "; ".join(f"{name}: {why}" for name, why in list(report.failed.items())[:5])
    return f"{len(report.failed)} samples could not be used: {first}{'; ...' if len(report.failed) > 5 else ''}."


def to_html(reports: Sequence[tuple[Report, dict[str, Any]]], title: str, made: dict[str, Any] | None = None) -> str:
    """Return one HTML page of one or more reports and their settings. The page loads nothing from elsewhere.

    Args:
        reports: The reports and their settings.
        title: The title of the page.
        made: As in `save`.
    """
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<h1>{html.escape(title)}</h1>",
    ]
    if len(reports) > 1:
        links = (f'<li><a href="#{html.escape(one.name)}">{html.escape(one.title)}</a></li>' for one, _ in reports)
        parts.append(f"<ol>{''.join(links)}</ol>")
    for report, settings in reports:
        if len(reports) > 1:
            parts.append(f'<h2 id="{html.escape(report.name)}">{html.escape(report.title)}</h2>')
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in report.says]
        parts += [_figure(chart) for chart in report.charts]
        parts += [_table(table) for table in report.tables]
        if report.failed:
            parts.append(f'<p class="note">{html.escape(_failures(report))}</p>')
        said = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())
        parts.append(f'<p class="note">Settings: {html.escape(said)}</p>')
    made = made or {"versions": versions(), "date": now()}
    parts.append(f'<p class="note">Made with: {html.escape(as_text(made))}</p>')
    return "\n".join([*parts, "</body></html>", ""])


def _figure(chart: Chart) -> str:
    data, caption = base64.b64encode(chart.png()).decode(), html.escape(chart.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    kinds = [' class="number"' if table.numeric(i) else "" for i in range(len(table.columns))]

    def row(tag: str, cells: Sequence[str]) -> str:
        parts = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row("td", cells) for cells in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    head = f"<caption>{html.escape(table.title)}</caption><thead>{row('th', table.columns)}</thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>{note}'
