"""Which token is what, and which pixels it covers: measured on the models themselves."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mllm_fast as mf
from mllm_fast.core.layout import ImageLayout, Tile, TokenLayout
from mllm_fast.models.processing import prompt_layout

# sizes that each processor takes without resampling, so that a pixel reaches exactly one token
SIZES = {"llava": [(32, 32), (64, 32), (33, 32)], "internvl": [(96, 64), (32, 32)], "qwen2_5_vl": [(64, 40), (24, 56)]}
CASES = [(family, size) for family in tiny.FAMILIES for size in SIZES[family]]


def image_tokens(vlm, picture):
    """The image embeddings that enter the language model, [n, d], and the layout."""
    inputs, sizes = vlm.prepare(picture, "what")
    seen = []
    handle = vlm.text.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        vlm.model(**inputs)
    handle.remove()
    layout = prompt_layout(vlm.prompts, inputs["input_ids"][0], inputs, sizes)
    return seen[0][0, layout.images[0].positions], layout.images[0]


@pytest.mark.parametrize(("family", "size"), CASES, ids=lambda x: str(x))
def test_each_token_covers_its_box(family, size):
    """With a vision tower of no layers a token depends on its own patch alone: painting a small square
    changes exactly the tokens whose boxes meet it."""
    model, processor = tiny.BUILD[family](vision_layers=0)
    vlm = mf.VLM(model.double(), processor)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    before, layout = image_tokens(vlm, Image.fromarray(pixels))
    boxes = layout.token_boxes()
    assert len(boxes) == len(layout.positions)
    thumbnails = len(layout.tiles) > 1
    first = sum(t.rows * t.cols for t in layout.tiles[: layout.canvas[0] * layout.canvas[1]])
    rng = np.random.default_rng(1)
    for _ in range(12):
        x, y = int(rng.integers(0, size[0] - 2)), int(rng.integers(0, size[1] - 2))
        painted = pixels.copy()
        painted[y : y + 2, x : x + 2] ^= 0x80
        after, _ = image_tokens(vlm, Image.fromarray(painted))
        changed = ((after - before).abs().amax(-1) > 1e-9).numpy()
        meets = (boxes[:, 0] < x + 2) & (boxes[:, 2] > x) & (boxes[:, 1] < y + 2) & (boxes[:, 3] > y)
        assert (changed[:first] == meets[:first]).all()
        if thumbnails:  # resampling smears over neighbours, but must reach the token that covers the pixel
            strongest = first + (after - before)[first:].norm(dim=-1).argmax().item()
            left, top, right, bottom = boxes[strongest]
            assert left - 4 <= x + 1 <= right + 4
            assert top - 4 <= y + 1 <= bottom + 4


def test_segments_cover_the_sequence(vlm, picture):
    said = vlm.generate(picture, "what color", max_new_tokens=3)
    segments = said.layout.segments
    parts = torch.cat([segments[name] for name in ("system", "image", "image_separator", "query", "generated")])
    assert sorted(parts.tolist()) == list(range(len(said.input_ids)))
    ids = said.input_ids
    assert (ids[segments["image"]] == vlm.processor.image_token_id).all()
    assert segments["system"].max() < segments["image"].min()
    assert len(segments["generated"]) == len(said.token_ids)
    with pytest.raises(ValueError, match="segment is one of"):
        said.layout.positions("answer")


def test_tokens_that_do_not_add_up():
    tile = Tile(2, 2, (0, 0, 8, 8))
    with pytest.raises(ValueError, match="disagree"):
        TokenLayout.from_input_ids(torch.tensor([1, 9, 9, 9, 2]), 9, [((8, 8), (tile,), (1, 1))])


@settings(max_examples=30)
@given(down=st.integers(1, 3), across=st.integers(1, 3), rows=st.integers(1, 5), cols=st.integers(1, 5), data=st.data())
def test_grid_keeps_the_sum(down, across, rows, cols, data):
    """Tiles side by side and a thumbnail spread by area: nothing is lost, and a constant thumbnail is flat."""
    tiles = [Tile(rows, cols, (0, 0, 1, 1)) for _ in range(down * across)] + [Tile(rows, cols, (0, 0, 1, 1))]
    count = len(tiles) * rows * cols
    layout = ImageLayout(torch.arange(count), (10, 10), tuple(tiles), (down, across))
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    grid = layout.to_grid(values)
    assert grid.shape == (3, down * rows, across * cols)
    torch.testing.assert_close(grid.sum((1, 2)), values.sum(1), rtol=1e-4, atol=1e-4)
    flat = torch.zeros(count)
    flat[-rows * cols :] = 1.0
    spread = layout.to_grid(flat)
    torch.testing.assert_close(spread, torch.full_like(spread, 1 / (down * across)))


def test_tiles_lie_where_they_should():
    tiles = tuple(Tile(1, 2, (0, 0, 1, 1)) for _ in range(4))
    layout = ImageLayout(torch.arange(8), (2, 2), tiles, (2, 2))
    assert layout.to_grid(torch.arange(8.0)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
