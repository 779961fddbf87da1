"""Save explanations as .png, .html, .json, .safetensors, .webp or .mp4 files, which appear whole or not at all."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..core.errors import InputError
from ..core.files import check_target, write_whole
from ..core.layout import ImageLayout
from ..core.moments import time_label
from ..core.png_notes import png_notes
from ..core.split import by_first
from ..models.provenance import as_text
from .animation import animated
from .box_weights import BoxWeights
from .figure import draw_sheet, draw_token
from .patch_words import patch_words as words_of_patches
from .registry import ALIGNMENT, DEFAULT, HEATMAP_METHODS, Heads
from .scores import Scores
from .text_map import text_positions, words_at

HEADS = 10  # the best heads of each token, whose maps are saved
_ALWAYS = ("logprob", "attention")  # pages and number files always contain these maps
_PAGE_SIDE = 1024  # longest side of an image in a page, in pixels
_FRAME_SIDE = 512  # that of a frame of a video


def save(
    ex: Scores,
    path: str | os.PathLike[str],
    token: int | None = None,
    method: str = "logprob",
    patch_words: bool = False,
    without: Tensor | None = None,
) -> None:
    """Write an explanation in the format that the file's ending names.

    Args:
        ex: the explanation.
        path: the file, with the ending .png, .html, .json or .safetensors; for a video also .webp or .mp4.
        token: the token that a picture or an animation shows alone, or that a .html shows first.
        method: the heatmap method of the maps.
        patch_words: whether a .html shows the words of each patch, layer by layer.
        without: positions that a second map of a .png leaves out.
    """
    target = Path(path)
    check_target(target, ENDINGS)
    kind = target.suffix.lower().removeprefix(".")
    if patch_words and kind != "html":
        raise InputError(f"the words of patches are in a page: save the explanation as .html, got {target.name}")
    if without is not None:
        if kind != "png":
            raise InputError(f"positions are left out of a picture: save the explanation as .png, got {target.name}")
        drawn = draw_token(ex, token or 0, method=method, without=without)
        content = _encode(drawn, provenance(ex, method))
    else:
        content = encoded(ex, kind, token, method, patch_words)
    by_first(ex.text_model.split, partial(write_whole, target, content))


def encoded(
    ex: Scores, kind: str, token: int | None = None, method: str = "logprob", patch_words: bool = False
) -> bytes:
    """Return the content of the file that `save` writes.

    Args:
        ex, token, method, patch_words: as in `save`.
        kind: "png", "html", "json", "safetensors", "webp" or "mp4".
    """
    if kind == "html":
        return _html(ex, token, method, patch_words)
    return _FORMATS[f".{kind}"](ex, token, method)


def summary(ex: Scores, numbers: bool = True) -> dict[str, Any]:
    """Return everything of an explanation that is not an image, ready for JSON.

    With `numbers=False` the scores of all heads and positions are left out, and only the ten best heads of each token
    are kept.
    """
    segments = {name: positions.tolist() for name, positions in ex.layout.segments.items()}
    result: dict[str, Any] = {
        "question": ex.prompt,
        "answer": ex.text,
        "finish_reason": ex.finish_reason,
        "norm": ex.final_norm,
        "tokens": [_token_summary(ex, i, numbers) for i in range(len(ex.tokens))],
        "images": [
            {"size": list(i.size), "grid": list(i.grid), "box": list(i.box), "tokens": len(i.positions)}
            | ({} if i.moment is None else {"moment": i.moment._asdict()})
            for i in ex.layout.images
        ],
    }
    if numbers:
        result["input_ids"] = ex.input_ids.tolist()
        result["segments"] = segments
        result["token_boxes"] = [i.token_boxes().tolist() for i in ex.layout.images]
        result["head_scores"] = ex.head_scores.tolist()
    return result


def _token_summary(ex: Scores, token: int, numbers: bool) -> dict[str, Any]:
    heads = ex.top_heads(token, HEADS)
    result: dict[str, Any] = {
        "text": ex.tokens[token],
        "id": ex.token_ids[token],
        "top_heads": [{"layer": layer, "head": head, "score": score} for layer, head, score in heads],
    }
    check = next((one for one in ex.verification if one.token == token), None)
    if check is not None:
        result["verification"] = {
            "map": check.method,
            "heads": check.heads,
            "verdict": check.verdict,
            "knocked_out": check.count,
            "of": check.of,
            "log_prob": check.log_prob,
            "change": {"highest": check.top, "lowest": check.lowest, "random": list(check.random)},
        }
    if numbers:
        scores = ex.position_scores(token, [(layer, head) for layer, head, _ in heads])
        for entry, row in zip(result["top_heads"], scores, strict=True):
            entry["position_scores"] = row.tolist()
        result["heatmaps"] = [ex.heatmap(token, image=i).tolist() for i in range(len(ex.images))]
        result["attention_maps"] = [ex.heatmap(token, "attention", image=i).tolist() for i in range(len(ex.images))]
    return result


def provenance(ex: Scores, method: str = DEFAULT) -> dict[str, Any]:
    """See `Explanation.provenance`."""
    return {
        **ex.made_with(),
        "date": ex.made,
        "question": ex.prompt,
        "answer": ex.text,
        "final_norm": ex.final_norm,
        "knockouts": ex.knockouts,
        "method": method,
        "heads": HEADS if method == DEFAULT else None,
    }


def _png(ex: Scores, token: int | None, method: str) -> bytes:
    if token is None and len(ex.tokens) > 1 and ex.images:
        return _encode(draw_sheet(ex, method=method), provenance(ex, method))
    return _encode(draw_token(ex, token or 0, method=method), provenance(ex, method))


def _encode(image: Image.Image, made: dict[str, Any] | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=None if made is None else png_notes(made))
    return buffer.getvalue()


def _json(ex: Scores, token: int | None, method: str) -> bytes:
    result = summary(ex)
    result["provenance"] = provenance(ex, method)
    if method not in _ALWAYS:
        result["method"] = method
        for i, entry in enumerate(result["tokens"]):
            entry["maps"] = [ex.heatmap(i, method, image=k).tolist() for k in range(len(ex.images))]
            if method == ALIGNMENT:
                entry["boxes"] = [_boxes(ex.box_weights(i, image=k)) for k in range(len(ex.images))]
    return json.dumps(result, ensure_ascii=False, allow_nan=False).encode()


def _boxes(found: BoxWeights, k: int = HEADS) -> dict[str, Any]:
    """Return the k boxes of largest weight, ready for JSON."""
    best = [{"weight": weight, "score": score, "box": list(box)} for weight, score, box in found.best(k)]
    return {"query": found.query, "boxes": best, "note": found.note}


def _safetensors(ex: Scores, token: int | None, method: str) -> bytes:
    count = len(ex.tokens)
    heads = [[(layer, head) for layer, head, _ in ex.top_heads(i, HEADS)] for i in range(count)]
    tensors = {
        "input_ids": ex.input_ids,
        "token_ids": torch.tensor(ex.token_ids),
        "head_scores": ex.head_scores,
        "top_heads": torch.tensor(heads),
        "position_scores": torch.stack([ex.position_scores(i, heads[i]) for i in range(count)]),
        "attention": torch.stack([ex.attention(i) for i in range(count)]),
    }
    for i, layout in enumerate(ex.layout.images):
        tensors[f"image_{i}.positions"] = layout.positions
        tensors[f"image_{i}.token_boxes"] = torch.from_numpy(layout.token_boxes())
        tensors[f"image_{i}.heatmaps"] = torch.stack([ex.heatmap(t, image=i) for t in range(count)])
        if method not in _ALWAYS:
            tensors[f"image_{i}.{method}"] = torch.stack([ex.heatmap(t, method, image=i) for t in range(count)])
        if method == ALIGNMENT:
            found = [ex.box_weights(t, image=i) for t in range(count)]
            tensors[f"image_{i}.boxes"] = found[0].boxes
            tensors[f"image_{i}.box_weights"] = torch.stack([one.weights for one in found])
            tensors[f"image_{i}.box_scores"] = torch.stack([one.scores for one in found])
    about = {"question": ex.prompt, "answer": ex.text, "norm": ex.final_norm, "tokens": json.dumps(ex.tokens)}
    about["mllm_fast.provenance"] = json.dumps(provenance(ex, method), ensure_ascii=False)
    return save_tensors({name: t.contiguous() for name, t in tensors.items()}, about)


def _html(ex: Scores, token: int | None, method: str, with_words: bool = False) -> bytes:
    meaning = HEATMAP_METHODS.get(method).meaning
    data = {
        "question": ex.prompt,
        "cut": ex.finish_reason == "length",
        "norm": ex.final_norm,
        "provenance": as_text(provenance(ex, method)),
        "start": token or 0,
        "images": [_page_image(picture, i) for picture, i in zip(ex.images, ex.layout.images, strict=True)],
        "tokens": [_page_token(ex, i, method) for i in range(len(ex.tokens))],
        "words": words_at(ex, text_positions(ex, len(ex.tokens) - 1)),
        "patches": [_page_words(ex, layout) for layout in ex.layout.images] if with_words else None,
        "method": None if method in _ALWAYS else {"name": method.replace("-", " "), "meaning": meaning},
    }
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # only "<" could end the script element
    encoded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    title = html.escape(f"{ex.prompt} \u2192 {ex.text}")
    filled = {"__TITLE__": title, "__DATA__": encoded}
    return re.sub("__TITLE__|__DATA__", lambda place: filled[place.group()], page).encode()


def _page_image(picture: Image.Image, layout: ImageLayout) -> dict[str, Any]:
    small, moment = picture.copy(), layout.moment
    side = _PAGE_SIDE if moment is None else _FRAME_SIDE
    small.thumbnail((side, side))
    return {
        "source": "data:image/png;base64," + base64.b64encode(_encode(small)).decode(),
        "size": list(layout.size),
        "box": list(layout.box),
        "video": None if moment is None else moment.video,
        "time": "" if moment is None else time_label(moment),
    }


def _page_words(ex: Scores, layout: ImageLayout) -> dict[str, Any]:
    """Return the words of each image token, layer by layer, and the token of each cell of the image's grid."""
    found = words_of_patches(ex, layout.positions)
    rows, cols = layout.grid
    left, top, right, bottom = layout.box
    middle = lambda begin, end, i, count: begin + (end - begin) * (i + 0.5) / count  # noqa: E731
    cells = [
        [layout.token_at(middle(left, right, col, cols), middle(top, bottom, row, rows)) for col in range(cols)]
        for row in range(rows)
    ]
    return {
        "layers": list(found.layers),
        "last": ex.num_layers,
        "words": list(found.words),
        "best": found.best.tolist(),
        "cells": cells,
    }


def _page_token(ex: Scores, token: int, method: str) -> dict[str, Any]:
    heads = ex.top_heads(token, HEADS)
    scores = ex.position_scores(token, [(layer, head) for layer, head, _ in heads])
    layouts = ex.layout.images
    return {
        "text": ex.labels[token],
        "checks": {
            "all": _check(ex, token, heads=HEADS),
            "attention": _check(ex, token, "attention"),
            "extra": None if method in _ALWAYS else _check(ex, token, method),
        },
        "read": _page_text(ex, token, scores),
        "maps": [_rounded(i.to_grid(scores.sum(0)[i.positions])) for i in layouts],
        "attention": [_rounded(ex.heatmap(token, "attention", image=i)) for i in range(len(layouts))],
        "extra": _page_extra(ex, token, method),
        "heads": [
            {
                "layer": layer,
                "head": head,
                "score": round(score, 4),
                "check": _check(ex, token, heads=[(layer, head)]),
                "maps": [_rounded(i.to_grid(row[i.positions])) for i in layouts],
            }
            for (layer, head, score), row in zip(heads, scores, strict=True)
        ],
    }


def _page_text(ex: Scores, token: int, scores: Tensor) -> dict[str, Any]:
    """Return the scores [heads, positions] and the mean attention of the text that a token could see."""
    places = text_positions(ex, token)
    attention = ex.attention(token).mean((0, 1))
    return {
        "heads": [[float(f"{x:.4g}") for x in row] for row in scores[:, places].tolist()],
        "attention": [float(f"{x:.4g}") for x in attention[places].tolist()],
        "image": round(float(scores[:, ex.layout.positions("image")].sum()), 4),
    }


def _check(ex: Scores, token: int, method: str = DEFAULT, heads: Heads = HEADS) -> dict[str, str] | None:
    """Return the verdict on one map, or None if the map was not checked."""
    check = ex.verified(token, method, heads)
    return None if check is None else {"verdict": check.verdict, "text": str(check)}


def _page_extra(ex: Scores, token: int, method: str) -> dict[str, Any] | None:
    """Return the maps of a method that a page does not show anyway, and the boxes behind them."""
    if method in _ALWAYS:
        return None
    images = range(len(ex.layout.images))
    found: dict[str, Any] = {"maps": [_rounded(ex.heatmap(token, method, image=i)) for i in images], "boxes": []}
    if method == ALIGNMENT:
        weights = [ex.box_weights(token, image=i) for i in images]
        found["query"] = weights[0].query
        found["boxes"] = [[[round(w, 3), *(round(x, 1) for x in box)] for w, _, box in one.best(5)] for one in weights]
    return found


def _rounded(grid: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in grid.tolist()]


def _webp(ex: Scores, token: int | None, method: str) -> bytes:
    return animated(ex, "webp", token, method, HEADS, provenance(ex, method))


def _mp4(ex: Scores, token: int | None, method: str) -> bytes:
    return animated(ex, "mp4", token, method, HEADS, provenance(ex, method))


_FORMATS = {".png": _png, ".html": _html, ".json": _json, ".safetensors": _safetensors, ".webp": _webp, ".mp4": _mp4}
ENDINGS = tuple(_FORMATS)
