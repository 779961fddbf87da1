"""Operators on tensors with backends in plain torch, C++ and Triton.

The package is installed as `mllm_fast.kernels` and never imports transformers. Importing it only binds the operators.
Their backends (the compiled extension, Triton) are loaded by the first call that needs them.
"""

from .dispatch import backend_report, wide_type
from .few_row_linear import few_row_linear, worth_reading
from .knockout_attention import Attention, join, knockout_attention, segment_table
from .logprob_increase import Base, OperatorCache, Unembedding, logprob_increase, weight_state
from .topk_compaction import Compaction, topk_compaction
from .weighted_values import weighted_values

__all__ = [
    "Attention",
    "Base",
    "Compaction",
    "OperatorCache",
    "Unembedding",
    "backend_report",
    "few_row_linear",
    "join",
    "knockout_attention",
    "logprob_increase",
    "segment_table",
    "topk_compaction",
    "weight_state",
    "weighted_values",
    "wide_type",
    "worth_reading",
]
