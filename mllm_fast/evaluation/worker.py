"""The work of each process of a run: load the model, and make the rows of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.errors import EndsRunError, InputError
from ..core.plugins import load_plugins
from ..models.loading import parse_device
from ..vlm import VLM
from .base import Evaluation
from .rows import Row
from .samples import Sample


@dataclass(frozen=True)
class ModelChoice:
    """A model that each process loads for itself; see `VLM.from_pretrained`.

    Attributes:
        name, device, dtype, backend: The arguments of `VLM.from_pretrained`.
        threads: The number of torch threads; None leaves torch's default.
        plugins: The plugins that a process imports first; see `load_plugins`.
    """

    name: str = "shapes"
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    threads: int | None = None
    plugins: tuple[str, ...] = ()

    def place(self) -> torch.device:
        """Return the device that the model will be on."""
        return parse_device(None if self.device == "auto" else self.device)

    def load(self, progress: bool | None = False) -> VLM:
        """Load the plugins and the model; `progress` is that of `VLM.from_pretrained`."""
        load_plugins(self.plugins)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return VLM.from_pretrained(
            self.name, device=self.device, dtype=self.dtype, backend=self.backend, progress=progress
        )


def rows_of(evaluation: Evaluation, vlm: VLM, sample: Sample) -> list[Row]:
    """Return the rows of a sample, or one row that says why there are none.

    Answers are greedy unless the evaluation asks for others, so that a run can be repeated.
    """
    try:
        with vlm.greedy():
            return evaluation.rows(vlm, sample)
    except EndsRunError:
        raise
    except (InputError, OSError) as error:
        return [{"error": " ".join(str(error).split())}]


_worker: tuple[Evaluation, VLM] | None = None


def begin(evaluation: Evaluation, model: ModelChoice) -> None:
    """Prepare a worker process: load the model and keep it with the evaluation."""
    global _worker
    _worker = evaluation, model.load()


def one(sample: Sample) -> tuple[str, list[Row]]:
    """Return a sample's name and its rows, in a worker process."""
    assert _worker is not None
    return sample.name, rows_of(*_worker, sample)
