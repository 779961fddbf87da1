"""A part that computes something else than its weights say is refused when the model is taken, by its name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.models.adapter import Adapter

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


@pytest.fixture
def model(family, built):
    """A model of its own, to be broken, and its processor."""
    whole, processor = built(family)
    return copy.deepcopy(whole), processor


def lora(model, *names: str, trained: bool = True):
    """An adapter on modules of these names, unmerged."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=not trained))
    return made.base_model.model


@pytest.mark.parametrize("part", ["lm_head", "o_proj"])
def test_an_adapter_that_is_not_merged(model, picture, part):
    """Scores are those of what the adapted layers compute: the same as after the adapter is merged."""
    model[0].lm_head.weight = nn.Parameter(model[0].lm_head.weight.detach().clone())  # not the embedding's
    adapted = lora(model[0], part)
    ex = mf.VLM(adapted, model[1]).explain(picture, "what is there", "red green")
    scores, positions = ex.head_scores, ex.position_scores(1)
    for module in list(adapted.modules()):
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    merged = mf.VLM(adapted, model[1]).explain(picture, "what is there", "red green")
    torch.testing.assert_close(scores, merged.head_scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(positions, merged.position_scores(1), rtol=0, atol=1e-5)


def test_an_adapter_that_was_merged_is_a_weight_like_any(model, picture):
    merged = lora(model[0], "lm_head")
    head = merged.lm_head
    head.merge()
    merged.lm_head = head.base_layer
    assert mf.VLM(merged, model[1]).explain(picture, "what is there", "red").head_scores.isfinite().all()


def doubled(module, args, output):
    return 1.001 * output


@pytest.mark.parametrize("part", ["lm_head", "norm", "o_proj"])
def test_a_hook_that_changes_what_a_part_gives(model, part):
    text = mf.VLM(*model).text
    where = {"lm_head": text.head, "norm": text.norm, "o_proj": text.outputs[-1]}[part]
    words = {"lm_head": "unembedding", "norm": "final norm", "o_proj": f"projection of layer {len(text.outputs) - 1}"}
    where.register_forward_hook(doubled)
    with pytest.raises(InputError, match=f"{words[part]} .* computes something else .*by 0.001"):
        mf.VLM(*model)


class OneMore(nn.Module):
    """As Gemma's norms: the weight is what is added to 1."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.full((width,), 0.1)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 8


@pytest.mark.parametrize("change", ["another gain", "scaled logits"])
def test_parts_of_another_kind_are_read_as_they_compute(model, picture, change):
    """Scores follow what a part computes: those of all heads are the same as log p(h + write) - log p(h)."""
    decoder = model[0].model.language_model
    if change == "another gain":
        decoder.norm = OneMore(decoder.config.hidden_size).double()
    else:
        model[0].lm_head.__class__ = Scaled
    vlm = mf.VLM(*model)
    ex = vlm.explain(picture, "what is there", "red", final_norm="own")
    with torch.no_grad():
        h = ex.trace.residual[0, 1]
        write = vlm.text.projection(1, 2) @ ex.trace.output[0, 1, 2]
        logs = [torch.log_softmax(model[0].lm_head(decoder.norm(x)), -1)[ex.token_ids[0]] for x in (h + write, h)]
    assert abs(float(logs[0] - logs[1]) - float(ex.head_scores[0, 1, 2])) < 1e-6


def test_a_norm_that_is_none(model):
    model[0].model.language_model.norm = nn.Identity()
    with pytest.raises(InputError, match=r"the final norm \(Identity\) computes something else"):
        mf.VLM(*model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason(model, dtype):
    mf.VLM(model[0].to(dtype), model[1])


def test_nothing_of_the_model_or_of_chance_moves(model):
    before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    mf.VLM(*model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[0].state_dict().items())
    assert isinstance(mf.VLM(*model).adapter, Adapter)
