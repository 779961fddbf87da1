"""The command `mllm-fast eval`: figures of the papers, on any model and on your own pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError
from .options import Backend, Device, Dtype, Json, Model, parse_keep, progress
from .report import bar, publish, samples_of

if TYPE_CHECKING:
    from ..evaluation.base import Evaluation
    from ..evaluation.judges.judge import Judge
    from ..evaluation.report import Report
    from ..evaluation.samples import Samples

NAMES = ("attention-share", "knockout-sweep", "heads", "localisation", "fidelity", "mme", "redundancy", "pope")
_NEEDS_MASKS = ("heads", "localisation", "fidelity")
_BENCHMARKS = ("mme", "redundancy", "pope")
_SCENES = 40


def evaluate(
    name: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}, judges, or all.")],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", "-i", help="A folder of pictures (pope: of its questions'); generated scenes if none."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="A benchmark's folder: MME's for mme and redundancy, POPE's for pope."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help='Shares of image tokens that mme, redundancy and pope keep: "5%"; several.')
    ] = None,
    count: Annotated[int | None, typer.Option(help=f"How many pictures; all of a folder, {_SCENES} scenes.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the rows and the report; used again, it goes on.")
    ] = Path("mllm-fast-eval"),
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model is asked.")] = "Describe the image.",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    masks: Annotated[
        Path | None, typer.Option(help="The pictures' objects: a .json in COCO's format, or a folder of .png masks.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the generated scenes.")] = 0,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help='Objects to look for: a JSON file {"nouns": {"dog": ["puppy"]}, "attributes": {}}.'),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(
            help="A model of an OpenAI-compatible endpoint: compares descriptions instead, and answers from one (mme,"
            " redundancy, pope)."
        ),
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="The endpoint; its key is read from OPENAI_API_KEY.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a million of its tokens, in dollars, to count cost.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="judges: a .csv of people's labels; knockout-sweep writes one to correct.")
    ] = None,
    reference: Annotated[
        str, typer.Option(help="Compare descriptions with the model's own answer, or with the truth that is known.")
    ] = "answer",
    question: Annotated[
        str, typer.Option(help="heads: what is asked of an object; {noun} is its name.")
    ] = "what color is the {noun}?",
    statement: Annotated[
        str, typer.Option(help="heads: the sentence that answers it, for the textual question.")
    ] = "the {noun} is {attribute}.",
    second_model: Annotated[
        str | None, typer.Option(help="heads: a language model to compare with, a folder or a hub id.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Each with its own model; the numbers do not depend on it.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="The processes are actors of a Ray Data job.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write the rows as rows.parquet as well.")] = False,
    model: Model = "shapes",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Make a figure of the papers: rows (.jsonl), tables, charts and a page, in a folder."""
    _check(name, images, masks, data, count, labels)
    chosen = NAMES if name == "all" else (name,)
    with progress("loading the libraries"):
        from ..evaluation.judges.agreement import agreement_report, read_labels
        from ..evaluation.judges.endpoint import Endpoint
        from ..evaluation.judges.judge import NounJudge, read_vocabulary, shapes_judge
        from ..evaluation.judges.judge_endpoint import EndpointJudge
        from ..evaluation.judges.reader_endpoint import EndpointReader
        from ..evaluation.report import check_charts
        from ..evaluation.rows import SETTINGS, write_parquet
        from ..evaluation.run import run
        from ..evaluation.studies.attention_share import AttentionShare
        from ..evaluation.studies.fidelity import Fidelity
        from ..evaluation.studies.heads import Heads
        from ..evaluation.studies.knockout_sweep import KnockoutSweep
        from ..evaluation.studies.localisation import Localisation
        from ..evaluation.studies.yes_no import REDUNDANCY_SHARES, Mme, Pope, Redundancy
        from ..evaluation.worker import ModelChoice
    check_charts()
    if ray:  # actors may live in another folder
        images, data, masks = (None if path is None else path.resolve() for path in (images, data, masks))
        out = out.resolve()
    words = None if vocabulary is None else read_vocabulary(vocabulary)
    judge: Judge | None = words
    reader: EndpointReader | None = None
    if judge_model is not None:
        endpoint = Endpoint(judge_model, base_url=judge_url, cache=out / "judge")
        judge, reader = EndpointJudge(endpoint), EndpointReader(endpoint)
    if images is not None and judge is None and "knockout-sweep" in chosen:
        raise InputError("knockout-sweep needs to know your pictures' objects: give --vocabulary or --judge-model")
    if labels is not None:
        judges: dict[str, Judge] = {"vocabulary": words or shapes_judge()}
        if judge is not None and judge is not words:
            judges["endpoint"] = judge
        publish([(agreement_report(read_labels(labels), judges, price), {"labels": str(labels)})], out, as_json)
        return
    shares = tuple(parse_keep(text) for text in keep or ())
    if any(isinstance(share, int) for share in shares):
        raise InputError(f"--keep is a share here, 5% or 0.05, got {', '.join(keep or ())}")
    samples = {one: _samples(one, images, masks, data, count, seed) for one in chosen}
    if masks is not None and words is None:
        words = NounJudge({thing.name: () for sample in samples[name].list for thing in sample.things or ()})
    choice = ModelChoice(model, device, dtype, backend)
    reports: list[tuple[Report, dict[str, Any]]] = []
    make: dict[str, Callable[[], Evaluation]] = {
        AttentionShare.name: lambda: AttentionShare(prompt, max_new_tokens),
        KnockoutSweep.name: lambda: KnockoutSweep(prompt, reference, judge, max_new_tokens, price),
        Heads.name: lambda: Heads(question, statement, words, second_model=second_model),
        Localisation.name: lambda: Localisation(prompt, words, max_new_tokens=max_new_tokens),
        Fidelity.name: lambda: Fidelity(prompt, words, max_new_tokens=max_new_tokens),
        Mme.name: lambda: Mme(shares or (0.02, 0.05), prompt, reader=reader, price=price),
        Redundancy.name: lambda: Redundancy(shares or REDUNDANCY_SHARES, prompt=prompt, reader=reader, price=price),
        Pope.name: lambda: Pope(shares, prompt, reader=reader, price=price),
    }
    evaluations = {one: make[one]() for one in chosen}
    with progress(f"loading {model}"):
        vlm = choice.load()
    for one in chosen:
        folder = out / one
        with bar(one) as tell:
            rows = run(evaluations[one], samples[one], choice, folder, processes, tell, vlm, ray)
        if parquet:
            write_parquet(rows, folder / "rows.parquet")
        reports.append((evaluations[one].report(rows), json.loads((folder / SETTINGS).read_text())))
    publish(reports, out, as_json)


def _check(
    name: str, images: Path | None, masks: Path | None, data: Path | None, count: int | None, labels: Path | None
) -> None:
    """Raise InputError for choices that do not go together, before anything is loaded."""
    if name not in (*NAMES, "judges", "all"):
        raise InputError(f"the evaluation is one of {', '.join(NAMES)}, judges, or all, got {name!r}")
    if (name == "judges") != (labels is not None):
        raise InputError("judges need people's labels, and nothing else does: give --labels, a .csv")
    if count is not None and count < 1:
        raise InputError(f"--count is at least 1, got {count}")
    if name == "all" and (images is not None or data is not None):
        raise InputError("all runs on generated scenes; for your own pictures name one evaluation")
    if data is not None and name not in _BENCHMARKS:
        raise InputError(f"--data is a benchmark's folder, for {', '.join(_BENCHMARKS)}, not for {name}")
    if name in _BENCHMARKS and images is not None and (data is None or name != "pope"):
        raise InputError(f"{name} needs questions: give the benchmark's folder with --data")
    if name in _NEEDS_MASKS and images is not None and masks is None:
        raise InputError(f"{name} needs your pictures' objects: give --masks, COCO's .json or a folder of .png")
    if masks is not None and (images is None or name in _BENCHMARKS):
        raise InputError("--masks belong to pictures: give their folder with --images")


def _samples(
    name: str, images: Path | None, masks: Path | None, data: Path | None, count: int | None, seed: int
) -> Samples:
    """The pictures that an evaluation runs on."""
    from ..evaluation.datasets import mme, pope, scene_pairs

    if data is not None:
        return pope(data, images, count) if name == "pope" else mme(data, count)
    if name in _BENCHMARKS:
        return scene_pairs(_SCENES if count is None else count, seed)
    return samples_of(images, masks, _SCENES if count is None and images is None else count, seed)
