"""The joint model: one vision embedding, read by both."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import owl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.core.layout import Tile
from mllm_fast.joint import Alignment, AlignmentConfig, Detector, JointModel
from mllm_fast.joint.checkpoint import SETTINGS, read_settings, write_settings
from mllm_fast.joint.grids import note, resample, same
from mllm_fast.joint.image_features import given_features, own_features
from mllm_fast.joint.model import word_of
from mllm_fast.joint.weights_id import weights_name

QUESTION, ANSWER = "what color is the circle ?", "red circle , red"


@pytest.fixture(scope="module")
def square():
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=("llava", "internvl"))
def vlm(request, built):
    return mf.VLM(*built(request.param))


@pytest.fixture(scope="module")
def joint(vlm):
    return owl.joint(vlm)


def test_reads_its_own_features_as_ever(vlm, square):
    inputs, _, _ = vlm.prompts.prepare([[square]], [QUESTION])
    with torch.inference_mode():
        features = own_features(vlm, inputs)
    plain = vlm.generate(square, QUESTION, max_new_tokens=8)
    with given_features(vlm, features):
        given_ = vlm.generate(square, QUESTION, max_new_tokens=8)
    assert given_.token_ids == plain.token_ids
    with given_features(vlm, torch.zeros_like(features)):
        blind = vlm.explain(square, QUESTION, ANSWER)
    assert blind.replay.embeds[0, blind.layout.positions("image")].abs().max() == 0


def test_the_model_reads_w_of_e(joint, square):
    seen = joint.see(square)
    ex = joint.explain(seen, QUESTION, ANSWER)
    expected = joint.alignment(resample(seen.vision.tokens[1:], seen.vision.tile, seen.tile))
    found = ex.replay.embeds[0, ex.layout.positions("image")]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_two_pictures_in_their_order(joint, square):
    other = Image.new("RGB", (32, 32), "blue")
    seen = joint.see_many([square, other])
    ex = joint.explain(seen, QUESTION, ANSWER)
    for i, one in enumerate(seen):
        found = ex.replay.embeds[0, ex.layout.images[i].positions]
        torch.testing.assert_close(found, joint.image_embeddings(one).detach(), rtol=1e-9, atol=1e-9)
    both = joint.generate([square, other], [QUESTION, QUESTION], max_new_tokens=6)
    alone = [joint.generate(one, QUESTION, max_new_tokens=6) for one in (square, other)]
    assert [one.token_ids for one in both] == [one.token_ids for one in alone]


def test_stream_and_context_read_it_too(joint, square):
    seen = joint.see(square)
    answer = joint.generate(seen, QUESTION, max_new_tokens=6)
    stream = joint.stream(seen, QUESTION, max_new_tokens=6, explain=True)
    joint.vlm.generate(square, QUESTION)  # another call between two steps reads its own
    steps = list(stream)
    assert [step.token_id for step in steps] == answer.token_ids
    options = {"keep": 1.0, "prompt": QUESTION, "max_new_tokens": 4}
    context, plain = joint.compress(seen, **options), joint.vlm.compress(square, **options)
    whole = joint.explain(seen, QUESTION, "red")
    length = context.prefix_length
    for layer, keys in enumerate(context.keys):
        torch.testing.assert_close(keys, whole.trace.keys[layer][:, :length], rtol=1e-6, atol=1e-6)
    assert not torch.equal(context.keys, plain.keys)


def test_a_streams_first_pass_has_its_surroundings(joint, square):
    """Some releases of transformers read the image before it, some in it."""
    entered = []

    @contextmanager
    def surroundings():
        entered.append("in")
        yield
        entered.append("out")

    stream = joint.vlm.stream(square, QUESTION, max_new_tokens=4)
    stream.first = surroundings()
    assert entered == []
    next(stream)
    assert entered == ["in", "out"]
    assert len([next(stream), next(stream)]) == 2
    assert entered == ["in", "out"]


def test_left_as_it_was_by_exception_too(joint, square):
    model = joint.vlm.model.model
    with pytest.raises(ZeroDivisionError), joint.reading([joint.see(square)]):
        _ = 1 / ("get_image_features" not in vars(model))
    assert "get_image_features" not in vars(model)
    with pytest.raises(RuntimeError, match="already"), joint.reading([joint.see(square)]):  # noqa: SIM117
        with joint.reading([joint.see(square)]):
            pass
    assert "get_image_features" not in vars(model)


def test_direction_is_the_gradient_of_the_logit(joint, square):
    seen = joint.see(square)
    ex = joint.explain(seen, QUESTION, ANSWER)
    token = 2
    found = joint.direction(ex, seen, token)
    assert found[0].abs().max() == 0  # the language model does not read the class token
    ids = ex.input_ids[: ex.layout.prompt_length + token][None]
    inputs, _, _ = joint.vlm.prompts.prepare([[square]], [QUESTION])

    def logit(tokens: torch.Tensor) -> torch.Tensor:
        with given_features(joint.vlm, joint.image_embeddings(seen.with_tokens(tokens))[None]):
            return joint.vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[
                0, -1, ex.token_ids[token]
            ]

    tokens = seen.vision.tokens.clone()
    leaf = tokens.clone().requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(logit(leaf), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    way = torch.randn(tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = float(logit(tokens + 0.01 * way) - logit(tokens - 0.01 * way)) / 0.02
    assert slope == pytest.approx(float((found * way).sum()), rel=0.01)


def test_gradient_alignment_is_one_of_the_maps(joint, square):
    ex = joint.explain(square, QUESTION, ANSWER)
    grid = ex.heatmap(1, "gradient-alignment")
    assert grid.shape == ex.layout.images[0].grid
    weights = ex.box_weights(1)
    assert weights.query == "a photo of a circle"
    left, top, right, bottom = ex.layout.images[0].box
    pixels = weights.pixels()[round(top) : round(bottom), round(left) : round(right)]
    rows, cols = grid.shape
    means = pixels.reshape(rows, pixels.shape[0] // rows, cols, pixels.shape[1] // cols).mean((1, 3))
    torch.testing.assert_close(grid, means, rtol=1e-5, atol=1e-6)
    assert weights.note.startswith("the detector's 5 x 5 tokens were resampled")
    assert ex.box_weights(1, "a photo of a star").query == "a photo of a star"
    asked = joint.explain(square, QUESTION, ANSWER, query="a red star")
    assert asked.box_weights(1).query == "a red star"


def test_an_explanation_without_a_detector_says_so(vlm, square):
    ex = vlm.explain(square, QUESTION, ANSWER)
    with pytest.raises(InputError, match="needs a detector"):
        ex.heatmap(0, "gradient-alignment")


def test_word_of_a_token():
    tokens = ["a", " red", "dish", ",", " circle"]
    assert [word_of(tokens, i) for i in range(5)] == ["a", "reddish", "reddish", ",", "circle"]


def test_a_grid_that_varies_is_refused(built):
    vlm = mf.VLM(*built("qwen2_5_vl"))
    with pytest.raises(InputError, match="qwen2_5_vl varies"):
        owl.joint(vlm)


def test_a_picture_of_several_tiles_is_refused(built, picture):
    joint = owl.joint(mf.VLM(*built("internvl")))
    with pytest.raises(InputError, match="into 3 tiles"):
        joint.see(picture)


def test_sizes_and_pairs_are_checked(vlm):
    detector = owl.detector()
    width = vlm.text.config.hidden_size
    with pytest.raises(InputError, match="W maps 31 numbers"):
        JointModel(detector, Alignment(AlignmentConfig("projector", 31, width, 8)), vlm)
    config = AlignmentConfig("projector", 30, width, 8)
    pair = {"owl": weights_name(detector.model), "vlm": weights_name(vlm.model)}
    JointModel(detector, Alignment(config, pair).double(), vlm)
    for part, named in (("owl", "detector"), ("vlm", "language model")):
        with pytest.raises(InputError, match=f"another {named}"):
            JointModel(detector, Alignment(config, pair | {part: "0" * 64}), vlm)
    other = owl.detector(seed=1)
    with pytest.raises(InputError, match="another detector"):
        JointModel(other, Alignment(config, pair), vlm)


def test_weights_have_one_name_in_every_precision():
    model = owl.detector().model
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    name = weights_name(model)
    assert weights_name(model.float()) == weights_name(model.bfloat16()) == name
    with torch.no_grad():
        model.box_head.dense0.weight[0, 0] += 1
    assert weights_name(model) != name


@pytest.mark.parametrize("kind", owl.KINDS)
def test_boxes_are_the_models_own(kind, square):
    detector = owl.detector(kind)
    picture = square.resize((48, 32))
    queries = ["a photo of a red circle", "a star"]
    vision = detector.see(picture)
    found = detector.boxes(vision, queries)
    inputs = detector.processor(text=[queries], images=picture, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.inference_mode():
        output = detector.model(**inputs)
    torch.testing.assert_close(found.logits, output.logits[0].float(), rtol=1e-5, atol=1e-5)
    expected = detector.processor.image_processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[picture.size[::-1]]
    )[0]["boxes"]
    torch.testing.assert_close(found.boxes, expected.float(), rtol=1e-4, atol=1e-3)


def test_detections_are_the_best_of_what_overlaps(monkeypatch):
    detector = owl.detector()
    vision = detector.see(Image.new("RGB", (40, 40), "gray"))
    every = detector.detect(vision, ["a circle"], threshold=0.0, overlap=None)
    assert len(every) == 25
    assert [one.score for one in every] == sorted((one.score for one in every), reverse=True)
    assert all(0 <= edge <= 40 for one in every for edge in one.box)
    fewer = detector.detect(vision, ["a circle"], threshold=0.0, overlap=0.1)
    assert fewer[0] == every[0]
    assert 0 < len(fewer) < 25
    assert detector.detect(vision, ["a circle"], threshold=1.0) == []
    with pytest.raises(InputError, match="threshold is 0 to 1"):
        detector.detect(vision, ["a circle"], threshold=2)


def test_queries_that_cannot_be_used():
    detector = owl.detector()
    for queries in ([], "a circle"):
        with pytest.raises(InputError, match="at least one text query"):
            detector.embed_queries(queries)
    with pytest.raises(InputError, match="query is empty"):
        detector.embed_queries(["a circle", " "])
    long = "a photo of a red circle " * 3
    with pytest.raises(InputError, match="takes 20 tokens, the detector's text window is 16"):
        detector.embed_queries([long])
    with pytest.raises(InputError, match="smaller than one patch"):
        detector.see(Image.new("RGB", (7, 300)))
    with pytest.raises(InputError, match="the limit is 99"):
        detector.see_many([Image.new("RGB", (10, 10))], max_pixels=99)
    with pytest.raises(InputError, match="the detector is an OwlViT"):
        Detector(torch.nn.Linear(2, 2), None)


tiles = st.builds(
    lambda rows, cols, left, top, width, height: Tile(rows, cols, (left, top, left + width, top + height)),
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(-5, 5),
    st.floats(-5, 5),
    st.floats(8, 60),
    st.floats(8, 60),
)


@settings(max_examples=60)
@given(tiles, tiles)
def test_resampling_keeps_what_is_linear_in_place(given_, wanted):
    middles = torch.from_numpy(given_.token_boxes())
    places = (middles[:, :2] + middles[:, 2:]) / 2
    found = resample(torch.cat([places, torch.full((len(places), 1), 3.0)], 1).double(), given_, wanted)
    assert found.shape == (wanted.rows * wanted.cols, 3)
    torch.testing.assert_close(found[:, 2], torch.full((len(found),), 3.0, dtype=torch.float64))
    boxes = torch.from_numpy(wanted.token_boxes())
    left, top = places.min(0).values
    right, bottom = places.max(0).values
    for value, (x0, y0, x1, y1) in zip(found, boxes, strict=True):
        if left <= x0 and x1 <= right and top <= y0 and y1 <= bottom:  # wholly between middles
            torch.testing.assert_close(value[:2], torch.stack([(x0 + x1) / 2, (y0 + y1) / 2]), rtol=1e-6, atol=1e-4)


def test_the_same_grid_is_left_alone_and_another_is_said(square):
    one, other = Tile(5, 5, (0, 0, 64, 64)), Tile(4, 4, (0, 0, 64, 64))
    tokens = torch.randn(25, 3)
    assert resample(tokens, one, one) is tokens
    assert same(one, one)
    assert note(one, one) == ""
    assert note(one, other) == "the detector's 5 x 5 tokens were resampled to the language model's 4 x 4"
    halves = Tile(2, 2, (0, 0, 64, 64))
    torch.testing.assert_close(
        resample(torch.arange(16.0)[:, None], Tile(4, 4, (0, 0, 64, 64)), halves)[:, 0],
        torch.tensor([2.5, 4.5, 10.5, 12.5]),
    )


@pytest.mark.parametrize("kind", ["mlp", "projector", "transformer"])
def test_alignments_are_saved_and_loaded(tmp_path, kind):
    config = AlignmentConfig(kind, 30, 48, hidden=20, layers=1, heads=2)
    made = Alignment(config, {"owl": "a"}, {"seen": 3})
    tokens = torch.randn(2, 7, 30)
    assert made(tokens).shape == (2, 7, 48)
    moved = tokens.clone()
    moved[:, 3] += torch.randn(30)
    changed = (made(moved) != made(tokens)).any(-1)[0]
    assert changed.sum() == (7 if kind == "transformer" else 1)  # else each token is on its own
    made.save(tmp_path / "w.safetensors")
    found = Alignment.load(tmp_path / "w.safetensors")
    assert (found.config, found.pair, found.about) == (config, {"owl": "a"}, {"seen": 3})
    assert torch.equal(found(tokens), made(tokens))


def test_an_alignment_file_that_cannot_be_used(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="there is no such file"):
        Alignment.load(path)
    made = Alignment(AlignmentConfig("mlp", 6, 4, hidden=5))
    made.save(path)
    whole = path.read_bytes()
    for content in (whole[:50], whole[:-7], b"", whole.replace(b'"kind\\": \\"mlp', b'"kind\\": \\"mlx')):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged|kind is one of"):
            Alignment.load(path)
    path.write_bytes(whole.replace(b'"mllm_fast_alignment":"1"', b'"mllm_fast_alignment":"2"'))
    with pytest.raises(InputError, match="format 2, this release reads 1"):
        Alignment.load(path)
    path.write_bytes(whole.replace(b'\\"hidden\\": 5', b'\\"hidden\\": 7'))
    with pytest.raises(InputError, match="its checksum does not fit"):
        Alignment.load(path)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="its checksum does not fit"):
        Alignment.load(path)
    early = whole.replace(b'"sha256":', b'"sha25x":')  # without a checksum, as earlier releases wrote them
    path.write_bytes(early)
    assert torch.equal(Alignment.load(path).body[0].weight, made.body[0].weight)
    for old, new, message in (
        (b'\\"hidden\\": 5', b'\\"hidden\\": 7', "its settings say"),
        (b'\\"hidden\\": 5', b'\\"hidden\\": 1000000000000', "its settings say|damaged"),
        (b'\\"depth\\": ', b'\\"depth\\": 2000', "damaged"),
    ):
        changed = early.replace(old, new)
        size = int.from_bytes(early[:8], "little") + len(new) - len(old)
        path.write_bytes(size.to_bytes(8, "little") + changed[8:])
        with pytest.raises(InputError, match=message):
            Alignment.load(path)
    with torch.no_grad():
        made.body[0].weight[0, 0] = torch.nan
    made.save(path)
    with pytest.raises(InputError, match="not finite"):
        Alignment.load(path)
    with pytest.raises(InputError, match=r"saved as \.safetensors"):
        made.save(tmp_path / "w.bin")
    for wrong in ({"kind": "linear"}, {"hidden": 0}, {"kind": "transformer", "heads": 4}):
        with pytest.raises(InputError):
            AlignmentConfig(**{"kind": "mlp", "inputs": 6, "outputs": 4, "hidden": 8, **wrong})


def test_a_folder_without_a_joint_model(tmp_path):
    with pytest.raises(InputError, match="holds no joint model"):
        JointModel.from_pretrained(tmp_path)
    write_settings(tmp_path, "some/owl", "shapes", "crop")
    assert read_settings(tmp_path) == {
        "detector": "some/owl",
        "model": "shapes",
        "view": "crop",
        "direction": "detector-to-model",
    }
    for content, message in (
        ("{", "does not name"),
        ('{"format": 2}', "of format 2"),
        ('{"format": 1}', "does not name"),
    ):
        (tmp_path / SETTINGS).write_text(content)
        with pytest.raises(InputError, match=message):
            JointModel.from_pretrained(tmp_path)


def test_families_with_a_fixed_grid():
    from mllm_fast.models.architectures import ARCHITECTURES

    fixed = {name for name in ARCHITECTURES if ARCHITECTURES.get(name).fixed_grid}
    assert fixed == {"llava", "vipllava", "internvl"}
