"""How the package's objects show themselves in a notebook, as a matplotlib axes, and as a table."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import InputError
from .extras import install_command

_STYLE = "border-collapse: collapse; font-size: 90%"


class Displayed:
    """An object that a notebook shows below a cell.

    A subclass says in `_repr_html_` what is shown.
    """

    def _repr_html_(self) -> str:
        raise NotImplementedError

    def show(self) -> None:
        """Show the object below the cell of a notebook; in a terminal, print it."""
        show_html(self._repr_html_(), repr(self))


class NotPickled:
    """An object that holds a model, which other processes load by themselves.

    A subclass says in `_INSTEAD` what to do.
    """

    _INSTEAD = ""

    def __copy__(self) -> Any:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} is not pickled or copied deeply, since it holds a model: {self._INSTEAD}"
        )


def show_html(page: str, text: str) -> None:
    """Show HTML below the cell of a notebook; elsewhere, print the text."""
    try:
        from IPython import get_ipython
        from IPython.display import HTML, display
    except ImportError:
        shell = None
    else:
        shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        print(text)
    else:
        display(HTML(page))


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Return an HTML table; the text of the cells is escaped, and may be of any script.

    Args:
        rows: The rows. A number is written with three digits.
        head: The names of the columns.
    """
    parts = [f'<table style="{_STYLE}">']
    if head:
        parts.append(
            "<tr>" + "".join(f'<th style="text-align: left">{html.escape(one)}</th>' for one in head) + "</tr>"
        )
    for row in rows:
        cells = "".join(f'<td style="text-align: left" dir="auto">{html.escape(_text(one))}</td>' for one in row)
        parts.append(f"<tr>{cells}</tr>")
    return "".join(parts) + "</table>"


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def picture(image: Any, alt: str) -> str:
    """Return a PIL image as an HTML image that holds its pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img style="max-width: 100%" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def axes(ax: Any = None) -> Any:
    """Return matplotlib axes to draw in: the given ones, or new ones.

    Raises:
        InputError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError(f"a plot needs matplotlib: {install_command('viz')}") from None
    return plt.subplots()[1]


def plot_image(image: Any, ax: Any = None) -> Any:
    """Draw a PIL image into matplotlib axes, and return them."""
    ax = axes(ax)
    ax.imshow(image)
    ax.set_axis_off()
    return ax


def frame(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> Any:
    """Return rows as a pandas DataFrame.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise InputError(f"a table needs pandas: {install_command('notebook')}") from None
    return pandas.DataFrame(list(rows), columns=list(columns))
