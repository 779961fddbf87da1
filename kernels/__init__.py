"""Kernels: tensors in, tensors out. Installed as `mllm_fast.kernels`; never imports transformers.

Importing the package binds the ops; their backends (the compiled extension, later Triton) are loaded by
the first call that needs them.
"""

from .dispatch import backend_report
from .logprob_increase import OperatorCache, Unembedding, logprob_increase, weight_state

__all__ = ["OperatorCache", "Unembedding", "backend_report", "logprob_increase", "weight_state"]
