"""What the evaluations of joint models share."""

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
    """An evaluation of the joint model in a folder ("shapes": the embedded one) with the run's language model."""

    def __init__(self, joint: str, **settings: Any):
        self.name_of_joint = joint
        self.settings = {"joint": joint, "weights": weights_digest(joint), **settings}
        self._made: dict[str, tuple[VLM, JointModel]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}  # each process loads its own

    def joint(self, vlm: VLM, name: str | None = None) -> JointModel:
        """The joint model, loaded once."""
        name = self.name_of_joint if name is None else name
        if name not in self._made or self._made[name][0] is not vlm:
            self._made[name] = vlm, JointModel.from_pretrained(name, vlm=vlm)
        return self._made[name][1]


def weights_digest(joint: str) -> str:
    """SHA-256, 12 digits, of W, which tells one training from another.

    Raises:
        InputError: no such joint model.
    """
    path = Path(joint_folder(joint)) / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` (Wilson's score)."""
    if not count:
        return 0.0, 1.0
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(share: float, count: int) -> str:
    """A share of `count` and its 95 % interval, in %."""
    low, high = interval(share, count)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def number_of(name: str) -> int:
    """A seed from a sample's name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
