"""What `mllm-fast explain` prints: the heads and the best patch of each word, and the attention sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from ..explain.registry import DEFAULT
from .options import OUT

if TYPE_CHECKING:
    from torch import Tensor

    from ..explain.explanation import Explanation


def print_explanation(ex: Explanation, chosen: int | None, method: str) -> None:
    from ..explain.registry import map_name
    from ..explain.verification import fall

    OUT.print(f"[bold]question[/] {escape(ex.prompt)}", highlight=False)
    OUT.print(f"[bold]answer[/]   {escape(ex.text)}", highlight=False)
    table = Table(title="what made the model say each word", title_justify="left", title_style="bold")
    table.add_column("token")
    table.add_column("best heads: layer.head, increase of log p")
    of_map = "" if method == DEFAULT else f" of {map_name(method)}"
    table.add_column(f"best patch{of_map}, pixels", justify="right")
    if ex.verification:
        table.add_column("check: log p falls without these patches")
    for i in range(len(ex.tokens)) if chosen is None else [chosen]:
        heads = "  ".join(f"{layer}.{head} {score:+.2f}" for layer, head, score in ex.top_heads(i, 4))
        row = [escape(ex.labels[i]), heads, _best_patch(ex, i, method)]
        check = ex.verified(i, method)
        if check is not None:
            random = sum(check.random) / len(check.random)
            falls = f"{fall(check.top)}, random {fall(random)}, lowest {fall(check.lowest)}"
            color = {"holds": "green", "fails": "red", "open": "dim"}[check.verdict]
            row.append(f"{falls}: [{color}]{check.verdict}[/]")
        table.add_row(*row)
    OUT.print(table, highlight=False)
    if any(check.verdict == "fails" for check in ex.verification):
        OUT.print("A map fails: knocking out other patches hurts its word as much.", style="red", highlight=False)


def _best_patch(ex: Explanation, token: int, method: str) -> str:
    """Return the patch where the map is highest, as "x 12-20, y 40-48" in pixels, with its time in a video."""
    from ..core.moments import time_label

    best, words = float("-inf"), ""
    for i, layout in enumerate(ex.layout.images):
        grid = ex.heatmap(token, method, image=i)
        if float(grid.max()) <= best:
            continue
        best = float(grid.max())
        rows, cols = grid.shape
        row, col = divmod(int(grid.argmax()), cols)
        left, top, right, bottom = layout.box
        x, y = (right - left) / cols, (bottom - top) / rows
        words = f"x {left + col * x:.0f}-{left + (col + 1) * x:.0f}, y {top + row * y:.0f}-{top + (row + 1) * y:.0f}"
        if layout.moment is not None:
            words = f"{time_label(layout.moment)}: {words}"
        elif len(ex.images) > 1:
            words = f"image {i}: {words}"
    return words


def print_sinks(found: Tensor | None) -> None:
    from ..knockout.rule import spans

    if found is not None:
        OUT.print(f"attention sinks: positions {spans(found.tolist())}" if len(found) else "no attention sinks")
