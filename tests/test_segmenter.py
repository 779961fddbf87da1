"""Masks by an object's name from models of transformers, tiny and random, against their own outputs."""

from __future__ import annotations

import numpy as np
import owl
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    SamConfig,
    SamModel,
    SamProcessor,
    SamVisionConfig,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.segmenter import Segmenter, _union
from mllm_fast.shapes.detector import TEXT_WINDOW, build_tokenizer

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clipseg")
    tokenizer = build_tokenizer()
    part = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    text = {**part, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_WINDOW}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPSegConfig(
        text_config=text,
        vision_config={**part, "image_size": 32, "patch_size": 8},
        projection_dim=12,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_intermediate_size=12,
        decoder_num_attention_heads=2,
    )
    torch.manual_seed(3)
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    images = ViTImageProcessorPil(size={"height": 32, "width": 32})
    CLIPSegProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clipseg(clipseg):
    """Its logits at the size of the picture, where they are positive."""
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg).eval()
    processor = CLIPSegProcessor.from_pretrained(clipseg)
    inputs = processor(images=[PICTURE], text=["red circle"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.reshape(32, 32)
        model.decoder.transposed_convolution.bias += -logits.median()  # so that half of the picture is inside
        logits = model(**inputs).logits.reshape(1, 1, 32, 32)
    model.save_pretrained(clipseg)
    wanted = torch.nn.functional.interpolate(logits.sigmoid(), size=(40, 70), mode="bilinear")[0, 0] > 0.5
    segmenter = Segmenter(str(clipseg))
    mask = segmenter.mask(PICTURE, "red circle")
    assert mask.shape == (40, 70)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, wanted.numpy())
    assert 0.1 < mask.mean() < 0.9
    assert Segmenter.__getstate__(segmenter)["_find"] is None


def test_a_detector_and_a_segmenter_of_boxes(tmp_path):
    """The masks of the boxes above the threshold, all together; none without a box."""
    detector = owl.detector()
    detector.model.float().save_pretrained(tmp_path / "owl")
    detector.processor.save_pretrained(tmp_path / "owl")
    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        mlp_dim=20,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=4,
    )
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16}
    decoder |= {"iou_head_hidden_dim": 8}
    torch.manual_seed(0)
    sam = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    sam.save_pretrained(tmp_path / "sam")
    images = SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})
    SamProcessor(images).save_pretrained(tmp_path / "sam")
    mask = Segmenter(f"{tmp_path / 'owl'}+{tmp_path / 'sam'}").mask(PICTURE, "red circle")
    inputs = detector.processor(images=PICTURE, text=[["a photo of a red circle"]], return_tensors="pt")
    with torch.no_grad():
        (found,) = detector.processor.post_process_grounded_object_detection(
            detector.model(**inputs), threshold=0.3, target_sizes=[(40, 70)]
        )
        boxes = found["boxes"].tolist()
        assert boxes
        processor = SamProcessor.from_pretrained(tmp_path / "sam")
        read = processor(images=PICTURE, input_boxes=[boxes], return_tensors="pt")
        out = sam(**read, multimask_output=False).pred_masks
        (drawn,) = processor.post_process_masks(out, read["original_sizes"], read["reshaped_input_sizes"])
    np.testing.assert_array_equal(mask, drawn.any(0)[0].numpy())
    with torch.no_grad():
        detector.model.class_head.logit_shift.bias -= 1e3
    detector.model.save_pretrained(tmp_path / "owl")
    assert not Segmenter(f"{tmp_path / 'owl'}+{tmp_path / 'sam'}").mask(PICTURE, "red circle").any()


def test_the_union_of_masks():
    masks = torch.zeros(2, 1, 40, 70, dtype=torch.bool)
    masks[0, 0, 1, 2] = masks[1, 0, 3, 4] = True
    assert np.argwhere(_union(masks, PICTURE)).tolist() == [[1, 2], [3, 4]]
    assert not _union(masks[:0], PICTURE).any()
    assert _union(masks[:0], PICTURE).shape == (40, 70)


@pytest.mark.parametrize(("name", "why"), [("gone", "cannot be loaded"), ("shapes", None)])
def test_models_that_are_no_segmenter(tmp_path, name, why, shapes):
    if why is None:
        shapes.model.config.save_pretrained(tmp_path / "shapes")
        why = "is a 'llava'; a segmenter that reads text is CLIPSeg"
    with pytest.raises(InputError, match=why):
        Segmenter(str(tmp_path / name)).mask(PICTURE, "dog")
