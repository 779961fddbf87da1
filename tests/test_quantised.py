"""Models whose layers a library has quantised: every library that runs on a CPU, against its own dequantised weights.

The model runs as its library computes it. The scores are those of the weights that the library dequantises, on the rows
that were recorded. Tolerance: that of float32, as for a model that is not quantised (2e-6 of the largest here); for
layers that compute in 16 bits on a CPU (bitsandbytes' 4-bit ones, GPTQ's scales) that of the type.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
import transformers as hf

import mllm_fast as mf

QUESTION, ANSWER = "what color is the circle ?", "red green , blue"
SINGLE, HALF, BRAIN = 1e-5, 4 * torch.finfo(torch.float16).eps, 4 * torch.finfo(torch.bfloat16).eps
Made = tuple[Any, Callable[[Any], Any]]  # a model, and what gives a quantised layer's weight, else None

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose text part has the sizes that the libraries take."""
    model, processor = tiny.llava()
    text = model.config.text_config
    text.hidden_size = text.intermediate_size = 128
    text.num_attention_heads = text.num_key_value_heads = 4
    text.head_dim, text.vocab_size = 32, -(-text.vocab_size // 128) * 128
    made = tmp_path_factory.mktemp("plain")
    families.finish(hf.LlavaForConditionalGeneration(model.config)).save_pretrained(made)
    processor.save_pretrained(made)
    return made


def load(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options).eval()


def torchao(folder: Path, name: str) -> Made:
    library = pytest.importorskip("torchao.quantization")
    by_groups = {
        "IntxWeightOnlyConfig": {"weight_dtype": torch.int4, "granularity": library.PerGroup(32)},
        "Int8DynamicActivationIntxWeightConfig": {
            "weight_dtype": torch.int4,
            "weight_granularity": library.PerGroup(32),
        },
    }
    model = load(folder)
    for part in (model.model.language_model, model.lm_head):
        library.quantize_(part, getattr(library, name)(**by_groups.get(name, {})))
    return model, lambda m: m.weight.dequantize() if is_subclass(m) else None


def is_subclass(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, torch.nn.Linear) and type(weight) is not torch.nn.Parameter


def quanto(folder: Path, weights: str) -> Made:
    pytest.importorskip("optimum.quanto")
    model = load(folder, quantization_config=hf.QuantoConfig(weights=weights))
    return model, lambda m: m.weight.dequantize() if type(m).__name__ == "QLinear" else None


TOWER = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]  # whose sizes are too small for its blocks


def bitsandbytes(folder: Path, kind: str) -> Made:
    library = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        settings = hf.BitsAndBytesConfig(load_in_8bit=True)
    else:
        options = {"bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.float32}
        settings = hf.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=TOWER, **options)
    model = load(folder, quantization_config=settings, device_map="cpu")

    def weight(module):
        if isinstance(module, library.nn.Linear8bitLt):
            return library.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        if isinstance(module, library.nn.Linear4bit):
            return library.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return None

    return model, weight


def hqq(folder: Path, bits: int) -> Made:
    library = pytest.importorskip("hqq.core.quantize")
    model, settings = load(folder), library.BaseQuantizeConfig(nbits=bits, group_size=64)
    text = model.model.language_model
    for name, module in list(text.named_modules()):
        if type(module) is torch.nn.Linear:
            packed = library.HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu")
            text.set_submodule(name, packed)
    return model, lambda m: m.dequantize() if type(m).__name__ == "HQQLinear" else None


def gptq(folder: Path, bits: int) -> Made:
    library = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    model, group = load(folder), 32
    text = model.model.language_model
    for name, module in list(text.named_modules()):
        if type(module) is not torch.nn.Linear:
            continue
        out, into = module.weight.shape
        scales = module.weight.detach().view(out, into // group, group).abs().amax(-1) / (2 ** (bits - 1) - 1)
        packed = library.TorchLinear(bits, group, True, False, into, out, bias=module.bias is not None)
        zeros = torch.full_like(scales, 2.0 ** (bits - 1))
        packed.pack_original(module, scales, zeros, torch.arange(into, dtype=torch.int32) // group)
        packed.post_init()
        text.set_submodule(name, packed.eval())
    return model, lambda m: m.dequantize_weight().mT if type(m).__name__ == "TorchLinear" else None


WAYS = {  # what makes a model, with what, the tolerance, and whether gradients flow
    "torchao int8": (torchao, "Int8WeightOnlyConfig", SINGLE, True),
    "torchao int8, rounded inputs": (torchao, "Int8DynamicActivationInt8WeightConfig", SINGLE, False),
    "torchao float8": (torchao, "Float8WeightOnlyConfig", SINGLE, True),
    "torchao int4": (torchao, "IntxWeightOnlyConfig", SINGLE, True),
    "torchao int4, rounded inputs": (torchao, "Int8DynamicActivationIntxWeightConfig", SINGLE, False),
    "quanto int8": (quanto, "int8", SINGLE, True),
    "quanto int4": (quanto, "int4", SINGLE, True),
    "quanto int2": (quanto, "int2", SINGLE, True),
    "quanto float8": (quanto, "float8", SINGLE, True),
    "bitsandbytes int8": (bitsandbytes, "int8", SINGLE, True),
    "bitsandbytes nf4": (bitsandbytes, "nf4", BRAIN, None),  # by the processor
    "bitsandbytes fp4": (bitsandbytes, "fp4", BRAIN, None),
    "hqq 4 bits": (hqq, 4, SINGLE, True),
    "hqq 8 bits": (hqq, 8, SINGLE, True),
    "gptq 4 bits": (gptq, 4, HALF, True),
}


def worst_error(vlm: mf.VLM, ex: Any, weights: dict[int, Any]) -> float:
    """Of the head scores, against float64 arithmetic on the recorded rows, of the largest score."""
    text, trace = vlm.text, ex.trace
    norm: Any = text.norm
    of = lambda module: weights.get(id(module), getattr(module, "weight", None)).double()  # noqa: E731
    head, outputs = of(text.head), [of(output) for output in text.outputs]
    worst = largest = 0.0

    def log_probs(rows):
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return torch.log_softmax((rows * norm.weight.double()) @ head.mT, -1)

    for t, token in enumerate(ex.token_ids):
        for i, (site, output) in enumerate(zip(text.sites, outputs, strict=True)):
            before = trace.residual[t, site.layer].double()
            each = output.unflatten(1, (site.num_heads, -1))
            writes = torch.einsum("ehd,hd->he", each, trace.output[t, i].double())
            truth = (log_probs(before + writes) - log_probs(before))[:, token]
            worst = max(worst, float((ex.head_scores[t, site.layer].double() - truth).abs().max()))
            largest = max(largest, float(truth.abs().max()))
    return worst / largest


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_the_dequantised_weights(way, folder, picture, record_property):
    make, kind, tolerance, has_gradient = WAYS[way]
    with torch.no_grad():
        model, weight = make(folder, kind)
        weights = {id(module): weight(module) for module in model.modules()}
    weights = {key: one for key, one in weights.items() if one is not None}
    assert len(weights) >= 20
    processor = hf.LlavaProcessor.from_pretrained(folder)
    rounds = has_gradient is False or way == "bitsandbytes int8"  # what the layers are given, to 8 bits
    with pytest.warns(UserWarning, match="quantised layers round") if rounds else nullcontext():
        vlm = mf.VLM(model, processor)
    ex = vlm.explain(picture, QUESTION, ANSWER, final_norm="own")
    error = worst_error(vlm, ex, weights)
    record_property("error", f"{error:.0e}")
    assert error <= tolerance
    positions = ex.position_scores(1, [(0, 0)])[0]
    assert positions.isfinite().all()
    assert vlm.compress(picture, keep=0.5).ask(QUESTION, max_new_tokens=3).token_ids
    assert vlm.generate(picture, QUESTION, knockout=mf.Knockout("image", "query"), max_new_tokens=3).token_ids
    assert ex.verify(tokens=[1], controls=2)[0].log_prob < 0
    if has_gradient is False:
        with pytest.raises(mf.InputError, match="no gradient flows"):
            ex.attribution(1, "gradient-input")
    elif has_gradient:
        assert ex.attribution(1, "gradient-input").isfinite().all()


def test_a_model_that_is_not_quantised(folder, picture):
    """The measure itself, on plain layers."""
    vlm = mf.VLM(load(folder), hf.LlavaProcessor.from_pretrained(folder))
    assert worst_error(vlm, vlm.explain(picture, QUESTION, ANSWER, final_norm="own"), {}) <= SINGLE
