"""What was found in a model, and what works with it, each tried on a small image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..core.errors import InputError, first_line

if TYPE_CHECKING:
    from ..vlm import VLM

_SIDE = 64  # pixels of the image
_QUESTION = "What is in the image?"


def model_facts(vlm: VLM) -> dict[str, Any]:
    """Return the parts of a model, and for each feature "works" or "refused: " and the reason.

    Each feature is tried on a small image with one new token or two, so it takes a few passes of the model.
    """
    found, text = vlm.text.findings, vlm.text
    sites = [
        {
            "layer": site.layer,
            "heads": site.num_heads,
            "key and value heads": site.num_kv_heads,
            "key size": site.key_dim,
            "value size": site.head_dim,
            "output projection": site.output,
            "gated": site.gated,
            "norm behind it": site.post_norm,
            "multiplier": site.multiplier,
            "sliding window": site.window,
            "cached": site.cache is not None,
        }
        for site in text.sites
    ]
    norm = text.final_norm()
    return {
        "type": vlm.model.config.model_type,
        "decoder": found.decoder,
        "layers": found.num_layers,
        "attention": sites,
        "layers without attention": {str(layer): kind for layer, kind in found.others.items()},
        "final norm": {"path": found.norm, "kind": norm.kind, "gain": "1 + weight" if norm.one_plus else "weight"},
        "unembedding": {"path": found.head, "scale": found.logit_scale, "soft cap": found.softcap},
        "image token": vlm.prompts.image_tokens.image,
        "image separators": sorted(vlm.prompts.image_tokens.separators),
        "decoding": _decoding(vlm),
        "features": _tried(vlm),
    }


def _decoding(vlm: VLM) -> str:
    """Return what runs the decoder's layers when an answer is read token by token."""
    from ..runtime.direct_decoder import why_not_direct

    reason = why_not_direct(vlm.text, vlm.backend)
    return f"by transformers: {reason}" if reason else "layers are run directly, in one call"


def _tried(vlm: VLM) -> dict[str, str]:
    """Return for each feature whether it works."""
    from ..knockout.rule import Knockout

    shades = np.linspace(0, 255, _SIDE * _SIDE * 3).reshape(_SIDE, _SIDE, 3)
    image = Image.fromarray(shades.astype(np.uint8))
    kept: dict[str, Any] = {}

    def explain() -> None:
        kept["explanation"] = vlm.explain(image, _QUESTION, "a b")
        kept["explanation"].head_scores  # noqa: B018

    def explained() -> Any:
        if "explanation" not in kept:
            raise InputError("nothing can be explained")
        return kept["explanation"]

    tries: dict[str, Callable[[], Any]] = {
        "generate": lambda: vlm.generate(image, _QUESTION, max_new_tokens=2),
        "explain": explain,
        "heatmap": lambda: explained().heatmap(0),
        "verify": lambda: explained().verify(tokens=[0], controls=1),
        "knockout": lambda: vlm.generate(
            image, _QUESTION, knockout=Knockout("image", "query+generated"), max_new_tokens=2
        ),
        "compress": lambda: vlm.compress(image, prompt=_QUESTION, score="query").ask(_QUESTION, max_new_tokens=2),
    }
    return {name: _outcome(one) for name, one in tries.items()}


def _outcome(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:  # whatever a model that nobody tried may raise is what is to be shown
        return f"refused: {first_line(error)}"
    return "works"
