"""The base class and helper functions of the evaluations of joint models."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...joint.checkpoint import WEIGHTS, joint_folder
from ...joint.model import JointModel
from ..base import Evaluation

if TYPE_CHECKING:
    from ...vlm import VLM


class JointEvaluation(Evaluation):
    """An evaluation of a joint model with the language model of the run.

    Args:
        joint: The folder of the joint model, or "shapes" for the embedded one.
        settings: Further settings that decide the rows.
    """

    def __init__(self, joint: str, **settings: Any):
        self.name_of_joint = joint
        self.settings = {"joint": joint, "weights": weights_digest(joint), **settings}
        self._made: dict[str, tuple[VLM, JointModel]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}  # each process loads its own

    def joint(self, vlm: VLM, name: str | None = None) -> JointModel:
        """Return the joint model of a name, by default that of the evaluation. It is loaded once."""
        name = self.name_of_joint if name is None else name
        if name not in self._made or self._made[name][0] is not vlm:
            made = JointModel.from_pretrained(name, vlm=vlm)
            if made.vlm is not vlm:  # a fine-tuned one; the evaluation's own model is greedy anyway
                made.vlm.model.generation_config.do_sample = False
            self._made[name] = vlm, made
        return self._made[name][1]


def weights_digest(joint: str) -> str:
    """Return the first 12 digits of the SHA-256 of W, which tells one training from another.

    Raises:
        InputError: The joint model does not exist.
    """
    path = Path(joint_folder(joint)) / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of `count` (Wilson's score interval)."""
    if not count:
        return 0.0, 1.0
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(share: float, count: int) -> str:
    """Return a share of `count` and its 95 % confidence interval as text, in %."""
    low, high = interval(share, count)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def number_of(name: str) -> int:
    """Return a seed from a sample's name. It is the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
