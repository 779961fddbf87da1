"""The evaluations that `mllm-fast eval` knows, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ..core.registry import Registry

if TYPE_CHECKING:
    from .base import Evaluation

E = TypeVar("E", bound="type[Evaluation]")

EVALUATIONS: Registry[type[Evaluation]] = Registry(
    "evaluation",
    "mllm_fast.evaluations",
    {
        name: f"mllm_fast.evaluation.studies.{module}"
        for name, module in (
            ("attention-share", "attention_share"),
            ("attention-maps", "attention_maps"),
            ("knockout-sweep", "knockout_sweep"),
            ("few-tokens", "few_tokens"),
            ("heads", "heads"),
            ("evidence", "evidence"),
            ("localisation", "localisation"),
            ("fidelity", "fidelity"),
            ("mme", "yes_no"),
            ("redundancy", "yes_no"),
            ("pope", "yes_no"),
            ("moments", "moments"),
        )
    },
)


def evaluation(cls: E) -> E:
    """Register an `Evaluation` under its `name`. Use it as a decorator of the class.

    An installed package registers an evaluation with an entry point in the group "mllm_fast.evaluations". The entry
    point has the name of the evaluation.
    """
    EVALUATIONS.register(cls.name, cls, cls.__module__)
    return cls
