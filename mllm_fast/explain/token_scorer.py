"""What scores the writes of single tokens of a model at once, made once until its weights change."""

from __future__ import annotations

from torch import nn

from ..kernels import Unembedding
from ..kernels.token_scores import TokenScorer, scorable
from ..models.text_model import TextModel


def token_scorer(text: TextModel, unembedding: Unembedding) -> TokenScorer | None:
    """Return what scores a model's writes, or None if its weights are not of that kind.

    Args:
        text: The text part of the model.
        unembedding: Its final norm and unembedding, which are the same object until their weights change.
    """
    state = [text.writes.write_state(site) for site in range(len(text.sites))]
    known = text.kept.get("token scorer")
    if known is None or known[0] is not unembedding or known[1] != state:
        text.kept["token scorer"] = known = unembedding, state, _made(text, unembedding)
    return known[2]


def _made(text: TextModel, unembedding: Unembedding) -> TokenScorer | None:
    if text.split is not None:
        return None
    plain = all(type(one) is nn.Linear and one.weight.device.type == "cpu" for one in text.outputs)
    alike = all(site.multiplier == 1 and site.num_heads == text.num_heads for site in text.sites)
    if text.findings.others or not (plain and alike) or any(text.post_norms):
        return None
    projections = [one.weight.detach() for one in text.outputs]
    whole = all(one.shape[1] == text.num_heads * text.head_dim for one in projections)
    usable = whole and scorable(unembedding, projections, text.num_heads)
    return TokenScorer(unembedding, projections, text.num_heads) if usable else None
