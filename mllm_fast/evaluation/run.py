"""Run an evaluation over its samples, in one process or in several. A run that was killed can be continued."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..core.plugins import loaded_plugins
from ..models.fingerprint import fingerprint
from .base import Evaluation, is_failed, is_open
from .ray_job import ray_rows
from .rows import Row, Rows
from .samples import Sample, Samples
from .worker import ModelChoice, begin, one, rows_of

if TYPE_CHECKING:
    from ..vlm import VLM

Progress = Callable[[int, int], None]  # the number of samples that are done, and of all samples


def run(
    evaluation: Evaluation,
    samples: Samples,
    model: ModelChoice,
    folder: Path,
    processes: int = 1,
    progress: Progress | None = None,
    vlm: VLM | None = None,
    ray: bool = False,
) -> dict[str, list[Row]]:
    """Run an evaluation: make the rows that `folder` does not hold yet, and return all rows.

    A sample that cannot be used (an image that is missing or damaged, a prompt beyond the model's window) gives one
    row {"error": why}. The next run tries such a sample again, and also a sample without a judge's answer. A run may
    be killed at any moment; the next run then makes the rows that are missing.

    Args:
        evaluation: The evaluation to run.
        samples: The samples to run it on. Their names must differ.
        model: The model, which each process loads for itself.
        folder: The folder of the rows.
        processes: The number of processes. It changes the time, but no row.
        progress: A function that is called with the number of samples that are done and of all samples.
        vlm: The model, if it is loaded already.
        ray: Whether the processes are actors of a Ray Data job. It changes the time, but no row.

    Returns:
        A dictionary from each sample's name to its rows, in the order of the samples.

    Raises:
        InputError: The folder holds rows of other settings, or another run writes to it.
        EndsRunError: An error that would fail every sample. The sample then leaves no row.
    """
    if processes < 1:
        raise InputError(f"processes is at least 1, got {processes}")
    names = [sample.name for sample in samples.list]
    if len(set(names)) < len(names):
        raise InputError(f"two samples are called {max(names, key=names.count)!r}: their rows could not be told apart")
    tell = progress or (lambda done, total: None)
    vlm = vlm or model.load()
    model = replace(model, plugins=tuple(loaded_plugins()))
    settings = {"evaluation": evaluation.name, **evaluation.settings, "samples": samples.origin}
    store = Rows(folder, settings | {"model": model.name, "fingerprint": fingerprint(vlm.model)})
    with store.open():
        done = store.read()
        again = {name for name in names if is_failed(done.get(name, [])) or is_open(done.get(name, []))}
        if again:  # what was missing may be there now
            store.forget(again)
            done = store.read()
        todo = [sample for sample in samples.list if sample.name not in done]
        count = len(samples.list) - len(todo)
        tell(count, len(samples.list))
        for name, rows in _work(evaluation, todo, model, vlm, min(processes, len(todo)), ray):
            store.append(name, rows)
            count += 1
            tell(count, len(samples.list))
        found = store.read()
    return {sample.name: found[sample.name] for sample in samples.list}


def _work(
    evaluation: Evaluation, todo: Sequence[Sample], model: ModelChoice, vlm: VLM, processes: int, ray: bool
) -> Iterator[tuple[str, list[Row]]]:
    """Yield each sample's name and its rows as soon as they are made."""
    if ray and todo:
        yield from ray_rows(evaluation, todo, model, processes)
        return
    if processes <= 1:
        for sample in todo:
            yield sample.name, rows_of(evaluation, vlm, sample)
        return
    threads = model.threads or max(1, (os.cpu_count() or 1) // processes)
    setup = evaluation, replace(model, threads=threads)
    with multiprocessing.get_context("spawn").Pool(processes, begin, setup) as pool:
        yield from pool.imap_unordered(one, todo)
