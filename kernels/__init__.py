"""Operators on tensors with backends in plain torch, C++ and Triton.

The package is installed as `mllm_fast.kernels` and never imports transformers. Importing it only binds the operators.
Their backends (the compiled extension, Triton) are loaded by the first call that needs them.
"""

import warnings
from typing import Any

from .autocast import cast_operands, without_autocast
from .decoder_layers import DecoderLayers, KeyStore, LayerWeights, LinearWeights, NormWeights, Part
from .dispatch import backend_report, wide_type
from .knockout_attention import Attention, join, knockout_attention, segment_table
from .logprob_increase import Base, OperatorCache, Unembedding, logprob_increase, weight_state
from .logprob_increase.shards import joined_increase, shard_increase
from .skinny_linear import skinny_linear, worth_reading
from .topk_compaction import Compaction, topk_compaction
from .weighted_values import weighted_values

__all__ = [
    "Attention",
    "Base",
    "Compaction",
    "DecoderLayers",
    "KeyStore",
    "LayerWeights",
    "LinearWeights",
    "NormWeights",
    "OperatorCache",
    "Part",
    "Unembedding",
    "backend_report",
    "cast_operands",
    "join",
    "joined_increase",
    "knockout_attention",
    "logprob_increase",
    "segment_table",
    "shard_increase",
    "skinny_linear",
    "topk_compaction",
    "weight_state",
    "weighted_values",
    "wide_type",
    "without_autocast",
    "worth_reading",
]


def __getattr__(name: str) -> Any:
    if name == "few_row_linear":  # until 0.3
        warnings.warn("few_row_linear is called skinny_linear now", DeprecationWarning, stacklevel=2)
        return skinny_linear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
