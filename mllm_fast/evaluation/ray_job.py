"""Run an evaluation's samples as a Ray Data job, on this machine's cores or on the cluster that Ray is connected to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import EndsRunError
from ..core.extras import install_command
from ..core.plugins import loaded_plugins
from .base import Evaluation
from .rows import Row
from .samples import Sample
from .worker import ModelChoice, rows_of


def ray_rows(
    evaluation: Evaluation, todo: Sequence[Sample], model: ModelChoice, workers: int
) -> Iterator[tuple[str, list[Row]]]:
    """Yield each sample's name and its rows as soon as they are made.

    Args:
        evaluation: The evaluation to run.
        todo: The samples to run it on.
        model: The model, which each actor loads for itself.
        workers: The number of actors. Each has a GPU of its own if the model runs on a GPU, else one core.

    Raises:
        EndsRunError: Ray is not installed, or there is an error that no sample is to blame for.
    """
    try:
        import ray
    except ImportError:
        raise EndsRunError(f"--ray needs Ray: {install_command('ray')}") from None
    gpu = model.place().type == "cuda"
    name = str(Path(model.name).resolve()) if Path(model.name).is_dir() else model.name
    choice = replace(model, name=name, threads=model.threads or 1, device="cuda" if gpu else model.device)
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        asked = ray.data.range(len(todo), override_num_blocks=len(todo))  # one block per sample, so that none waits
        for (
            module
        ) in loaded_plugins().values():  # a worker unpickles a plugin's objects before it can import the plugin
            ray.cloudpickle.register_pickle_by_value(module)
        worker: Any = _Worker
        made = asked.map(
            worker,
            fn_constructor_args=(evaluation, choice, todo),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0 if gpu else 1,
            num_gpus=1 if gpu else 0,
        )
        # hides each job's plan and progress; set here because the logger is made with the dataset
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        for found in made.iter_rows():
            entry = json.loads(found["entry"])
            if "ends" in entry:
                raise EndsRunError(entry["ends"])
            yield entry["sample"], entry["rows"]
    finally:
        if mine:
            ray.shutdown()


class _Worker:
    """An actor of the job. It returns rows as JSON, so that they equal the rows of a run without Ray."""

    def __init__(self, evaluation: Evaluation, model: ModelChoice, samples: Sequence[Sample]):
        self._evaluation, self._vlm, self._samples = evaluation, model.load(), samples

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        sample = self._samples[int(item["id"])]
        try:
            entry = {"sample": sample.name, "rows": rows_of(self._evaluation, self._vlm, sample)}
        except EndsRunError as error:  # Ray would wrap the exception in pages of its own text
            entry = {"ends": str(error)}
        return {"entry": json.dumps(entry, ensure_ascii=False, allow_nan=False)}
