"""An evaluation's samples as a Ray Data job: on this machine's cores, or on the cluster that Ray is connected to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import EndsRunError
from ..core.plugins import loaded_plugins
from .base import Evaluation
from .rows import Row
from .samples import Sample
from .worker import ModelChoice, rows_of


def ray_rows(
    evaluation: Evaluation, todo: Sequence[Sample], model: ModelChoice, workers: int
) -> Iterator[tuple[str, list[Row]]]:
    """A sample's name and its rows, as they are made; `workers` actors, each with its own model: on a GPU of its own if
    the model is on one, else on one core.

    Raises:
        EndsRunError: Ray is not there, or what no sample is to blame for.
    """
    try:
        import ray
    except ImportError:
        raise EndsRunError("--ray needs Ray: pip install 'mllm-fast[ray]'") from None
    gpu = model.place().type == "cuda"
    name = str(Path(model.name).resolve()) if Path(model.name).is_dir() else model.name
    choice = replace(model, name=name, threads=model.threads or 1, device="cuda" if gpu else model.device)
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        asked = ray.data.range(len(todo), override_num_blocks=len(todo))  # a block a sample: none waits for another
        for module in loaded_plugins().values():  # a worker unpickles what they define before it can import them
            ray.cloudpickle.register_pickle_by_value(module)
        worker: Any = _Worker
        made = asked.map(
            worker,
            fn_constructor_args=(evaluation, choice, todo),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0 if gpu else 1,
            num_gpus=1 if gpu else 0,
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # else each job's plan and progress; made with the data
        for found in made.iter_rows():
            entry = json.loads(found["entry"])
            if "ends" in entry:
                raise EndsRunError(entry["ends"])
            yield entry["sample"], entry["rows"]
    finally:
        if mine:
            ray.shutdown()


class _Worker:
    """One actor. Rows travel as JSON, so that they are what the other ways write."""

    def __init__(self, evaluation: Evaluation, model: ModelChoice, samples: Sequence[Sample]):
        self._evaluation, self._vlm, self._samples = evaluation, model.load(), samples

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        sample = self._samples[int(item["id"])]
        try:
            entry = {"sample": sample.name, "rows": rows_of(self._evaluation, self._vlm, sample)}
        except EndsRunError as error:  # which Ray would wrap in pages of its own
            entry = {"ends": str(error)}
        return {"entry": json.dumps(entry, ensure_ascii=False, allow_nan=False)}
