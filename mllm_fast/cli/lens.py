"""The option --lens of `mllm-fast explain`: which words the vectors of the residual stream stand for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from ..core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from ..explain.explanation import Explanation

_SPEC = re.compile(r"\s*(all|\d+)(?:\.(\d+|attention|mlp))?(?:@(\d+)(?:,(\d+))?)?\s*")
_WORDS = 5


class Lens(NamedTuple):
    """What one --lens asks for.

    Attributes:
        text: The option as it was given.
        layer: The layer; None for all.
        part: A head, "attention", "mlp" or "residual".
        position: A position of the sequence, or None for the word's own row.
        pixel: A pixel (x, y) of the first image, in place of a position.
    """

    text: str
    layer: int | None
    part: int | str
    position: int | None
    pixel: tuple[int, int] | None


class Lenses:
    """The lenses of one command.

    Args:
        texts: The options --lens.
        words: The option --words.

    Raises:
        InputError: A lens is not understood.
    """

    def __init__(self, texts: list[str], words: str):
        self._lenses = [parse_lens(text) for text in texts]
        self._words = [word.strip() for word in words.split(",") if word.strip()]
        self._found: list[list[dict[str, Any]]] = []

    def read(self, ex: Explanation, token: int) -> None:
        """Read the vectors of one token."""
        self._found = [rows_of(ex, token, lens, self._words) for lens in self._lenses]

    def summary(self) -> dict[str, Any]:
        """Return what was read, ready for JSON; empty without a lens."""
        return {"lens": [row for rows in self._found for row in rows]} if self._found else {}

    def show(self, console: Console) -> None:
        """Print one table for each lens."""
        for rows in self._found:
            console.print(table_of(rows), highlight=False)


def parse_lens(text: str) -> Lens:
    """Return what a text such as "3", "3.1", "3.mlp", "all@17" or "all@120,40" asks for.

    Raises:
        InputError: The text is none of these.
    """
    found = _SPEC.fullmatch(text)
    if not found:
        raise InputError(
            'a lens is "LAYER", "LAYER.HEAD", "LAYER.attention" or "LAYER.mlp", LAYER a number or all, with "@POSITION"'
            f' or "@X,Y" (a pixel of the image) behind it if it is not the word\'s own place; got {text!r}'
        )
    layer, part, first, second = found.groups()
    pixel = (int(first), int(second)) if second is not None else None
    position = int(first) if first is not None and pixel is None else None
    number = int(part) if part is not None and part.isdigit() else part or "residual"
    return Lens(text, None if layer == "all" else int(layer), number, position, pixel)


def rows_of(ex: Explanation, token: int, lens: Lens, words: list[str]) -> list[dict[str, Any]]:
    """Return the words of a lens, layer by layer, ready for JSON.

    Args:
        ex: The explanation.
        token: The index of the explained token.
        lens: What is asked for.
        words: Words whose rank is shown as well.
    """
    position = lens.position if lens.pixel is None else _at_pixel(ex, lens.pixel)
    layers = range(ex.num_layers + (lens.part == "residual")) if lens.layer is None else [lens.layer]
    found = []
    for layer in layers:
        where = token, layer, lens.part, position
        ranks = ex.ranks(words, *where) if words else []
        found.append(
            {
                "lens": lens.text,
                "token": ex.tokens[token],
                "layer": layer,
                "part": lens.part,
                "position": position,
                "words": [[word, value] for word, value in ex.project(*where, k=_WORDS)],
                "ranks": {word: rank for word, (rank, _) in zip(words, ranks, strict=False)},
            }
        )
    return found


def _at_pixel(ex: Explanation, pixel: tuple[int, int]) -> int:
    """Return the position of the image token whose box holds a pixel; of several the smallest box."""
    if not ex.layout.images:
        raise InputError("the prompt has no image, so a lens has no pixel to look at")
    image = ex.layout.images[0]
    x, y = pixel
    token = image.token_at(x, y)
    if token is None:
        raise InputError(f"no image token lies at pixel {x},{y}; the image has {image.size[0]} x {image.size[1]}")
    return int(image.positions[token])


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the words of a lens as a table, with one row a layer."""
    first = rows[0]
    at = "" if first["position"] is None else f", position {first['position']}"
    part = "residual stream before it" if first["part"] == "residual" else f"what {_named(first['part'])} adds"
    title = f"{first['token'].strip()}: {part}{at}, in words"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("nearest words")
    for word in first["ranks"]:
        table.add_column(f"rank of {word}", justify="right")
    for row in rows:
        words = "  ".join(f"{word.strip() or repr(word)} {value:+.2f}" for word, value in row["words"])
        table.add_row(str(row["layer"]), escape(words), *map(str, row["ranks"].values()))
    return table


def _named(part: int | str) -> str:
    return f"head {part}" if isinstance(part, int) else part
