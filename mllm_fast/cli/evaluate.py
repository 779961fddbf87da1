"""The command `mllm-fast eval`: reproduce the papers' figures with any model, and with your own images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.assets import EMBEDDED, EMBEDDED_VIDEO
from ..core.errors import InputError
from ..core.keep import parse_keep
from ..evaluation.registry import EVALUATIONS
from .joint import Orientation
from .options import OUT, Backend, Device, Dtype, Json, Model, loading, progress, tell_embedded
from .report import bar, publish, samples_of, tell_notes

if TYPE_CHECKING:
    from ..evaluation.base import Evaluation
    from ..evaluation.judges.agreement import Labelled
    from ..evaluation.judges.judge import Judge, NounJudge
    from ..evaluation.judges.reader_endpoint import EndpointReader
    from ..evaluation.report import Report
    from ..evaluation.samples import Samples
    from ..evaluation.segmenter import Segmenter

_SCENES = 40
_DESCRIBE = {"knockout-sweep", "few-tokens"}  # they compare the objects of descriptions


def evaluate(  # long: the options of a command are its parameters
    name: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(EVALUATIONS)}; judges compares judges with people, all runs every evaluation on"
            " generated scenes."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option("--images", "-i", help="A folder of images (pope: of its questions'); generated scenes if none."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "-d",
            help="A benchmark's folder: MME's for mme and redundancy, POPE's for pope; for moments one with videos and"
            " events.json.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help='Shares of image tokens that mme, redundancy and pope keep: "5%"; several.')
    ] = None,
    count: Annotated[int | None, typer.Option(help=f"How many images; all of a folder, {_SCENES} scenes.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the rows and the report; used again, it goes on.")
    ] = Path("mllm-fast-eval"),
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model is asked.")] = "Describe the image.",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest description, in tokens; 300 for mme, redundancy and pope, else 64.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="The images' objects: a .json in COCO's format, or a folder of .png masks.")
    ] = None,
    orientation: Orientation = "auto",
    seed: Annotated[int, typer.Option(help="The seed of the generated scenes, or of --sample.")] = 0,
    sample: Annotated[
        bool, typer.Option("--sample", help="--count images of the folder at random, by --seed; else the first ones.")
    ] = False,
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
    judge_style: Annotated[
        str,
        typer.Option(
            help='How it compares: "lists", as in the paper, thinks in words and leaves properties out; "pairs" gives'
            " JSON, and properties count."
        ),
    ] = "lists",
    judge_url: Annotated[str | None, typer.Option(help="The endpoint; its key is read from OPENAI_API_KEY.")] = None,
    price: Annotated[
        float | None, typer.Option(help="The price of a million of its tokens in dollars, to count the cost.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="For judges: a .csv of people's labels. knockout-sweep writes one to correct.")
    ] = None,
    ratings: Annotated[
        list[Path] | None,
        typer.Option(help="For judges: raters' answers (.csv) to the questions of --page, several; table A1."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="For judges: write a page (.html) on which raters check a judge's --labels."),
    ] = None,
    reference: Annotated[
        str, typer.Option(help="Compare descriptions with the model's own answer, or with the truth that is known.")
    ] = "answer",
    question: Annotated[
        str, typer.Option(help="For heads and evidence: the question about an object; {noun} is its name.")
    ] = "what color is the {noun}?",
    statement: Annotated[
        str,
        typer.Option(help="For heads and evidence: the sentence that answers it, for the question without an image."),
    ] = "the {noun} is {attribute}.",
    second_model: Annotated[
        str | None, typer.Option(help="For heads and evidence: a language model to compare with, a folder or a hub id.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help='For heads and evidence: how the answer begins, "The color of the {noun} is".'),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="For heads and evidence: ask without the chat template.")] = False,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart", help="For attention-share: the system's tokens and an image's marks apart from the text."
        ),
    ] = False,
    objects: Annotated[
        str,
        typer.Option(
            help='For localisation: the objects that are "lost" when the image is closed to the generated tokens, or'
            ' "all".'
        ),
    ] = "lost",
    segmenter: Annotated[
        str | None,
        typer.Option(
            help="For localisation: a model that finds masks by name (CLIPSeg, SAM 3, or DETECTOR+SAM), a folder or a"
            " hub id."
        ),
    ] = None,
    band: Annotated[
        list[str] | None,
        typer.Option(help='For knockout-sweep: layers that stay open, "20-40", both included; several.'),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="For mme: a task that counts, several; the ten of perception by default.")
    ] = None,
    parser: Annotated[
        str | None,
        typer.Option(help='How a yes or no is read: "mme", as its script does, or "first", the first yes or no.'),
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
    """Run an evaluation of the papers, on generated scenes or on your own images.

    The folder --out gets the measured rows (.jsonl), tables, charts and a page with the report.
    If a run is stopped, the same command goes on from the rows that are there.
    """
    if name not in (*EVALUATIONS, "judges", "all"):
        raise InputError(f"the evaluation is one of {', '.join(EVALUATIONS)}, judges, or all, got {name!r}")
    _check_judges(name, labels, ratings, page)
    if count is not None and count < 1:
        raise InputError(f"--count is at least 1, got {count}")
    shares = tuple(parse_keep(text) for text in keep or ())
    if any(isinstance(share, int) for share in shares):
        raise InputError(f"--keep is a share here, 5% or 0.05, got {', '.join(keep or ())}")
    with progress("loading the libraries"):
        from ..evaluation.base import EvaluationOptions
        from ..evaluation.judges.judge import NounJudge, read_vocabulary
        from ..evaluation.report import check_charts, noted
        from ..evaluation.rows import SETTINGS, write_parquet
        from ..evaluation.run import run
        from ..models.provenance import made_with
    chosen = {one: EVALUATIONS.get(one) for one in (EVALUATIONS if name == "all" else (name,)) if one != "judges"}
    _check(name, chosen, images, masks, data, segmenter)
    check_charts()
    if ray:  # actors may run in another working directory
        images, data, masks = (None if path is None else path.resolve() for path in (images, data, masks))
        out = out.resolve()
    words = None if vocabulary is None else read_vocabulary(vocabulary)
    judge, reader = (
        (words, None) if judge_model is None else _endpoint(judge_model, judge_style, judge_url, out / "judge")
    )
    if images is not None and judge is None and (asks := _DESCRIBE & set(chosen)):
        needy = " and ".join(sorted(asks))
        raise InputError(f"{needy} needs to know your images' objects: give --vocabulary or --judge-model")
    if labels is not None:
        _judges(labels, ratings or [], page, (words, judge, price), (count, seed), out, as_json)
        return
    samples = {
        one: _samples(kind, images, masks, data, count, seed, sample, orientation) for one, kind in chosen.items()
    }
    if masks is not None and words is None:
        words = NounJudge({thing.name: () for sample in samples[name].list for thing in sample.things or ()})
    options = EvaluationOptions(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        words=words,
        judge=judge,
        reader=reader,
        price=price,
        shares=shares,
        reference=reference,
        question=question,
        statement=statement,
        second_model=second_model,
        prefix=prefix,
        chat_template=not raw,
        bands=tuple(band or ()),
        tasks=tuple(task or ()),
        parser=parser,
        apart=apart,
        objects=objects,
        segmenter=_segmenter(segmenter, device),
    )
    evaluations = {one: kind.from_options(options) for one, kind in chosen.items()}
    models = _Models(model, device, dtype, backend)
    reports: list[tuple[Report, dict[str, Any]]] = []
    for one in chosen:
        folder, (choice, vlm) = out / one, models.of(chosen[one])
        with bar(one) as tell:
            rows = run(evaluations[one], samples[one], choice, folder, processes, tell, vlm, ray)
        if parquet:
            write_parquet(rows, folder / "rows.parquet")
        report = noted(evaluations[one].report(rows), samples[one].notes)
        reports.append((report, json.loads((folder / SETTINGS).read_text())))
    publish(reports, out, as_json, made_with(models.of(next(iter(chosen.values())))[1].model))
    if images is not None or data is not None:  # its own scenes are what it knows
        tell_embedded(model)


class _Models:
    """The models of a run, each loaded when it is first needed.

    Args:
        name: The model that is evaluated; of the embedded ones that for videos reads videos.
        device, dtype, backend: As in `VLM.from_pretrained`.
    """

    def __init__(self, name: str, device: str | None, dtype: str | None, backend: str):
        self._name, self._rest = name, (device, dtype, backend)
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def of(self, kind: type[Evaluation]) -> tuple[Any, Any]:
        """Return the choice of the model that an evaluation runs on, and the model."""
        from ..evaluation.worker import ModelChoice

        name = EMBEDDED_VIDEO if kind.of_videos and self._name == EMBEDDED else self._name
        if name not in self._loaded:
            choice = ModelChoice(name, *self._rest)
            with loading(name):
                self._loaded[name] = choice, choice.load(progress=None)
        return self._loaded[name]


def _check(
    name: str,
    chosen: dict[str, type[Evaluation]],
    images: Path | None,
    masks: Path | None,
    data: Path | None,
    segmenter: str | None,
) -> None:
    """Raise InputError if the options contradict each other, before a model is loaded."""
    if name == "all" and (images is not None or data is not None):
        raise InputError("all runs on generated scenes; for your own images name one evaluation")
    kind = chosen.get(name)
    benchmark = kind.benchmark if kind is not None else ""
    videos = kind is not None and kind.of_videos
    if videos and images is not None:
        raise InputError(f"{name} reads videos: give a folder with them and events.json with --data")
    if data is not None and not benchmark and not videos:
        asking = [one for one in EVALUATIONS if EVALUATIONS.get(one).benchmark]
        raise InputError(f"--data is a benchmark's folder, for {', '.join(asking)}, not for {name}")
    if benchmark and images is not None and (data is None or benchmark != "pope"):
        raise InputError(f"{name} needs questions: give the benchmark's folder with --data")
    if segmenter is not None and name != "localisation":
        raise InputError(f"--segmenter is for localisation, not for {name}")
    if kind is not None and kind.needs_masks and images is not None and masks is None and segmenter is None:
        raise InputError(f"{name} needs your images' objects: give --masks, COCO's .json or a folder of .png")
    if masks is not None and (images is None or benchmark):
        raise InputError("--masks belong to images: give their folder with --images")


def _segmenter(name: str | None, device: str | None) -> Segmenter | None:
    if name is None:
        return None
    from ..evaluation.segmenter import Segmenter
    from ..models.loading import parse_device

    return Segmenter(name, parse_device(None if device == "auto" else device))


def _endpoint(model: str, style: str, url: str | None, cache: Path) -> tuple[Judge, EndpointReader]:
    """Return a judge of descriptions and a reader of them, which use the same endpoint."""
    from ..evaluation.judges.endpoint import Endpoint
    from ..evaluation.judges.judge_endpoint import EndpointJudge
    from ..evaluation.judges.reader_endpoint import EndpointReader

    endpoint = Endpoint(model, base_url=url, cache=cache)
    return EndpointJudge(endpoint, style), EndpointReader(endpoint)


def _check_judges(name: str, labels: Path | None, ratings: list[Path] | None, page: Path | None) -> None:
    """Raise InputError if the options of the evaluation "judges" are missing, or are given to another one."""
    if (name == "judges") != (labels is not None):
        raise InputError("judges need labels, and nothing else does: give --labels, a .csv of knockout-sweep")
    if (ratings or page is not None) and name != "judges":
        raise InputError(f"--ratings and --page are for judges, not for {name}")


def _judges(
    labels: Path,
    ratings: list[Path],
    page: Path | None,
    compared: tuple[NounJudge | None, Judge | None, float | None],
    sample: tuple[int | None, int],
    out: Path,
    as_json: bool,
) -> None:
    """Compare judges with people, or write the page on which people rate a judge's labels."""
    from ..core.files import check_target, write_whole
    from ..evaluation.judges.agreement import read_labels
    from ..evaluation.judges.ratings import rating_page, ratings_report, read_ratings

    pairs = read_labels(labels)
    if page is not None:
        check_target(page, (".html",))
        write_whole(page, rating_page(pairs, *sample).encode())
        OUT.print(f"saved {page}", highlight=False, soft_wrap=True)
        return
    settings: dict[str, Any] = {"labels": str(labels)}
    if ratings:
        report = ratings_report(pairs, read_ratings(ratings))
        settings["ratings"] = [str(file) for file in ratings]
    else:
        report = _agreement(pairs, *compared)
    publish([(report, settings)], out, as_json)


def _agreement(pairs: list[Labelled], words: NounJudge | None, judge: Judge | None, price: float | None) -> Report:
    """Return a report on how far judges agree with people's labels."""
    from ..evaluation.judges.agreement import agreement_report
    from ..evaluation.judges.judge import shapes_judge

    judges: dict[str, Judge] = {"vocabulary": words or shapes_judge()}
    if judge is not None and judge is not words:
        judges["endpoint"] = judge
    return agreement_report(pairs, judges, price)


def _samples(
    kind: type[Evaluation],
    images: Path | None,
    masks: Path | None,
    data: Path | None,
    count: int | None,
    seed: int,
    sample: bool = False,
    orientation: str = "auto",
) -> Samples:
    """Return the samples that an evaluation runs on."""
    from ..evaluation.datasets import mme, pope, scene_pairs

    if kind.of_videos:
        from ..evaluation import videos

        return videos.clips(_SCENES if count is None else count, seed) if data is None else videos.videos(data, count)
    if sample and kind.benchmark:
        raise InputError("--sample takes images of a folder, not a benchmark's")
    if data is not None:
        found = pope(data, images, count) if kind.benchmark == "pope" else mme(data, count)
        tell_notes(found)
        return found
    if kind.benchmark:
        return scene_pairs(_SCENES if count is None else count, seed)
    first = _SCENES if count is None and images is None else count
    return samples_of(images, masks, first, seed, sample, orientation)
