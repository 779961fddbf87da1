"""Kernels: tensors in, tensors out. Installed as `mllm_fast.kernels`; never imports transformers.

Importing the package binds the ops; their backends (the compiled extension, Triton) are loaded by
the first call that needs them.
"""

from .dispatch import backend_report
from .knockout_attention import Attention, knockout_attention, segment_table
from .logprob_increase import OperatorCache, Unembedding, logprob_increase, weight_state

__all__ = [
    "Attention",
    "OperatorCache",
    "Unembedding",
    "backend_report",
    "knockout_attention",
    "logprob_increase",
    "segment_table",
    "weight_state",
]
