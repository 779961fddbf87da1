"""The commands `mllm-fast joint ...` that measure a joint model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..core.errors import InputError
from .joint import SCENES, Count, Folder, JointName, Masks, Orientation, OutFolder, Processes, Seed, Vocabulary, joint
from .options import OUT, Device, Dtype, Json, loading, progress
from .report import bar, publish, samples_of, tell_notes
from .shown import Command

if TYPE_CHECKING:
    from ..evaluation.joint.base import JointEvaluation
    from ..evaluation.joint.reverse_quality import ReverseQuality
    from ..evaluation.samples import Samples

_PRESENT = "Does the image show a {}? Answer with one word, yes or no."
_PROPERTY = (
    "On a scale from 1 to 10, how likely is it that the person in this picture is {}? Answer with the number alone."
)


@joint.command(cls=Command)
def evaluate(  # long: the options of a command are its parameters
    joints: Annotated[
        list[str] | None, typer.Option("--joint", help="A folder that `joint train` wrote, or 'shapes'; several.")
    ] = None,
    images: Folder = None,
    masks: Masks = None,
    orientation: Orientation = "auto",
    count: Count = None,
    seed: Seed = 0,
    question: Annotated[str, typer.Option("--question", "-q", help="Asked of images of a folder.")] = (
        "Describe the image."
    ),
    sample: Annotated[
        bool, typer.Option("--sample", help="--count images of the folder at random, by --seed; else the first ones.")
    ] = False,
    captions: Annotated[
        Path | None, typer.Option(help="COCO's captions of the images (.json): people's are scored, too.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest answer, in tokens; 300 of images of a folder, 64 of scenes.")
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(help="A model that sees images, of an OpenAI-compatible endpoint: scores texts."),
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="The endpoint; its key is read from OPENAI_API_KEY.")] = None,
    price: Annotated[float | None, typer.Option(help="The price of a million of its tokens in dollars.")] = None,
    out: OutFolder = Path("mllm-fast-joint"),
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure what is lost when the detector and the language model share one vision embedding.

    The report compares answers, embeddings and boxes.
    With --judge-model it also compares a judge's scores of descriptions.
    """
    with progress("loading the libraries"):
        from ..evaluation.coco_colors import first_captions
        from ..evaluation.joint.caption_score import CaptionJudge
        from ..evaluation.joint.quality import JointQuality
        from ..evaluation.joint.reverse_quality import ReverseQuality
        from ..evaluation.judges.endpoint import Endpoint
        from ..joint.checkpoint import REVERSE, joint_folder, read_settings
        from ..shapes.scenes import COLORS, SHAPES
    first = SCENES if count is None and images is None else count
    samples = samples_of(images, masks, first, seed, sample, orientation=orientation)
    if captions is not None and (images is None or judge_model is None):
        raise InputError("--captions are scored by a judge, of images of your own: give --images and --judge-model")
    told = {} if captions is None else first_captions(captions)
    if images is None:
        classes = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    else:
        classes = sorted({thing.name for sample in samples.list for thing in sample.things or ()})
    judge = None
    if judge_model is not None:
        judge = CaptionJudge(Endpoint(judge_model, base_url=judge_url, cache=out / "judge"))
    if read_settings(joint_folder((joints or ["shapes"])[0]))["direction"] == REVERSE:
        if len(joints or ()) > 1 or judge is not None:
            raise InputError("the opposite direction is evaluated alone, and by its boxes")
        reverse = ReverseQuality((joints or ["shapes"])[0], classes)
        run_evaluation(reverse, samples, out, processes, device, dtype, as_json)
        return
    limit = (64 if images is None else 300) if max_new_tokens is None else max_new_tokens
    evaluation = JointQuality(joints or ["shapes"], classes, question, judge, limit, told, price)
    run_evaluation(evaluation, samples, out, processes, device, dtype, as_json)


@joint.command(cls=Command)
def pointing(
    name: JointName = "shapes",
    count: Count = None,
    seed: Seed = 0,
    out: OutFolder = Path("mllm-fast-pointing"),
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure whether gradient alignment points at the object that a question is about.

    On generated scenes, it counts how often the map's heaviest pixel lies in the object's box and on the object itself.
    """
    with progress("loading the libraries"):
        from ..evaluation.joint.pointing import Pointing
    run_evaluation(
        Pointing(name),
        samples_of(None, None, SCENES if count is None else count, seed),
        out,
        processes,
        device,
        dtype,
        as_json,
    )


@joint.command(cls=Command)
def simulatability(
    name: JointName = "shapes",
    images: Folder = None,
    masks: Masks = None,
    orientation: Orientation = "auto",
    count: Count = None,
    seed: Seed = 0,
    vocabulary: Vocabulary = None,
    out: OutFolder = Path("mllm-fast-simulatability"),
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure whether the maps of two words show which map belongs to which word.

    The words name different objects of one image, and the guess is made by where the objects are.
    Gradient alignment, log-probability maps and mean attention are compared.
    """
    with progress("loading the libraries"):
        from ..evaluation.joint.simulatability import Simulatability
        from ..evaluation.judges.judge import NounJudge, read_vocabulary
    if images is not None and masks is None:
        raise InputError("simulatability needs your images' objects: give --masks, COCO's .json or a folder of .png")
    first = SCENES if count is None and images is None else count
    samples = samples_of(images, masks, first, seed, orientation=orientation)
    words = None if vocabulary is None else read_vocabulary(vocabulary)
    if words is None and images is not None:
        words = NounJudge({thing.name: () for sample in samples.list for thing in sample.things or ()})
    run_evaluation(Simulatability(name, words), samples, out, processes, device, dtype, as_json)


@joint.command(cls=Command)
def study(  # long: the options of a command are its parameters
    name: JointName = "shapes",
    images: Folder = None,
    masks: Masks = None,
    orientation: Orientation = "auto",
    count: Annotated[int, typer.Option(help="How many questions.")] = 10,
    seed: Seed = 0,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the model is asked.")] = None,
    answer: Annotated[str | None, typer.Option(help="The answer whose last word is explained, {} is a thing.")] = None,
    key: Annotated[
        Path | None, typer.Option(help="The key.json of a study whose --answers are read; none makes a study.")
    ] = None,
    answers: Annotated[list[Path] | None, typer.Option(help="A reader's answers (.csv), several.")] = None,
    out: OutFolder = Path("mllm-fast-study"),
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Make the paper's user study, or read its answers: can people tell whose map is whose?

    The folder --out gets study.html, a page for the readers, and key.json. With --key and --answers it gets a report.
    """
    if (key is None) != (not answers):
        raise InputError("the answers of a study need its key: give --key and --answers, or neither to make a study")
    with progress("loading the libraries"):
        from ..core.files import write_whole
        from ..evaluation.joint import study as made
        from ..joint.model import JointModel
    if key is not None:
        truth = made.read_key(key)
        said = made.read_answers(answers or (), len(truth))
        settings = {"key": str(key), "answers": [str(file) for file in answers or ()]}
        publish([(made.study_report(truth, said), settings)], out, as_json)
        return
    if images is not None and masks is None:
        raise InputError("a study needs your images' objects: give --masks, COCO's .json or a folder of .png")
    samples = samples_of(images, masks, 3 * count if images is None else None, seed, orientation=orientation)
    own = images is None  # the embedded model knows few words
    with loading(name):
        model = JointModel.from_pretrained(name, device=device, dtype=dtype)
    with progress("explaining"):
        questions = made.study_questions(
            model,
            samples,
            count,
            seed,
            prompt or ("Describe the image." if own else made.PROMPT),
            answer or ("a {}" if own else made.ANSWER),
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "study.html", made.study_page(questions).encode())
    write_whole(out / "key.json", made.study_key(questions).encode())
    if as_json:
        typer.echo(json.dumps({"saved": str(out), "questions": len(questions)}))
        return
    OUT.print(f"saved {escape(str(out / 'study.html'))} and its key", highlight=False, soft_wrap=True)


@joint.command(cls=Command)
def bias(
    lower: Annotated[list[str], typer.Option(help="Text queries that lose: 'a photo of a red object'.")],
    higher: Annotated[list[str], typer.Option("--raise", help="Text queries that gain.")],
    name: JointName = "shapes",
    neutral_lower: Annotated[
        list[str] | None, typer.Option(help="The same of things that have nothing to do with the question.")
    ] = None,
    neutral_higher: Annotated[list[str] | None, typer.Option("--neutral-raise", help="As --neutral-lower.")] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", "-i", help="A folder of images; of a second one the swap runs the other way round."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="What is asked; of scenes, colour and shape.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="What is compared: text, yes (its probability), score (1 to 10, as an expectation).")
    ] = "text",
    size: Annotated[float, typer.Option(help="The size of a change, as a share of the embedding's norm.")] = 0.5,
    controls: Annotated[int, typer.Option(help="Random changes of the same norm, an image.")] = 3,
    count: Count = None,
    seed: Seed = 0,
    out: OutFolder = Path("mllm-fast-bias"),
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure how the text changes when one thing is made to look like another.

    The image embedding is changed so that the queries of --lower lose and those of --raise gain.
    Random changes of the same size and neutral changes are measured for comparison.
    """
    with progress("loading the libraries"):
        from ..evaluation.joint.bias import Asked, Bias, Swap, swap_scenes, swapped_colors, two_folders
    if bool(neutral_lower) != bool(neutral_higher):
        raise InputError("--neutral-lower and --neutral-raise belong together: queries that lose and that gain")
    if not neutral_lower and images:
        raise InputError("name what has nothing to do with the question: --neutral-lower and --neutral-raise")
    swap = Swap(tuple(lower), tuple(higher))
    neutral = Swap(
        tuple(neutral_lower or ["a photo of a green object"]), tuple(neutral_higher or ["a photo of a yellow object"])
    )
    questions = [Asked(text, text, kind) for text in question or ()]
    if images:
        samples = two_folders(images, count)
    else:
        colors = swapped_colors(swap)
        if None in colors:
            raise InputError("the generated scenes have colours to swap: --lower 'a photo of a red object' --raise ...")
        samples = swap_scenes(SCENES if count is None else count, seed, *map(str, colors))
    run_evaluation(
        Bias(name, swap, neutral, questions, size, controls=controls), samples, out, processes, device, dtype, as_json
    )


@joint.command("bias-table", cls=Command)
def bias_table(
    groups: Annotated[
        list[str], typer.Option("--group", "-g", help="The name of a group: woman, man. Two, in the folders' order.")
    ],
    properties: Annotated[
        list[str] | None, typer.Option("--property", "-p", help="A property to ask for, several: honest, a doctor.")
    ] = None,
    name: JointName = "shapes",
    images: Annotated[
        list[Path] | None, typer.Option("--images", "-i", help="The folder of each group; generated scenes if none.")
    ] = None,
    query: Annotated[str, typer.Option(help="The detector's text query for a group, {} is its name.")] = (
        "a photo of a {}"
    ),
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="What is asked, {} is the property; the answer is a number.")
    ] = None,
    way: Annotated[
        str, typer.Option(help="signed: the paper's one signed step; step or pgd: of a given norm, see `joint bias`.")
    ] = "signed",
    size: Annotated[
        float | None, typer.Option(help="How far each number of E moves, 1; of step and pgd a share of E's norm, 0.5.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many images a group; all of a folder.")] = None,
    seed: Seed = 0,
    out: OutFolder = Path("mllm-fast-bias-table"),
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Make the paper's tables of biases: how a score changes when one group is made to look like the other.

    Each property has a row, and each direction a column.
    """
    with progress("loading the libraries"):
        from ..evaluation.joint.bias import swapped_scenes, two_folders
        from ..evaluation.joint.bias_table import BiasTable
    if len(groups) != 2:
        raise InputError(f"--group is given twice, got {', '.join(groups)}")
    if images is not None and len(images) != 2:
        raise InputError(f"--images is given twice, a folder for each group, got {len(images)}")
    if images is not None and not properties:
        raise InputError("name properties: --property honest --property 'a doctor'")
    if images:
        samples = two_folders(images, count)
    else:
        samples = swapped_scenes(SCENES // 2 if count is None else count, seed, groups[0], groups[1])
    asked = question or (_PROPERTY if images else "how many objects are there?")
    shown = "a photo of a {} object" if not images and query == "a photo of a {}" else query
    evaluation = BiasTable(
        name,
        (groups[0], groups[1]),
        ([shown.format(groups[0])], [shown.format(groups[1])]),
        properties or ["number of objects"],
        asked,
        way,
        (1.0 if way == "signed" else 0.5) if size is None else size,
    )
    run_evaluation(evaluation, samples, out, processes, device, dtype, as_json)


@joint.command("answers-and-boxes", cls=Command)
def answers_and_boxes(
    name: JointName = "shapes",
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="A class, several; all of --masks by default.")
    ] = None,
    images: Folder = None,
    masks: Masks = None,
    orientation: Orientation = "auto",
    count: Count = None,
    seed: Seed = 0,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="What is asked about a class, {} is its name.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="The detector's text query, {} is the class.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 4,
    out: OutFolder = Path("mllm-fast-answers-and-boxes"),
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure the detector's confidence behind the model's yes and no, for what is there and what is not.

    Every class is asked about in every image, those without objects included.
    """
    with progress("loading the libraries"):
        from ..evaluation.coco_objects import categories, coco
        from ..evaluation.joint.answers_and_boxes import AnswersAndBoxes
        from ..shapes.scenes import SHAPES
    if images is not None and (masks is None or masks.is_dir()):
        raise InputError("the classes and what is there are read from COCO's file: give --masks, a .json")
    if images is not None and masks is not None:
        samples, known = coco(masks, images, count, empty=True, orientation=orientation), categories(masks)
        tell_notes(samples)
    else:
        samples, known = samples_of(None, masks, SCENES if count is None else count, seed), list(SHAPES)
    asked = question or ("is there a {}?" if images is None else _PRESENT)
    shown = query or ("a photo of a {}" if images is None else "{}")
    evaluation = AnswersAndBoxes(name, classes or known, asked, shown, max_new_tokens)
    run_evaluation(evaluation, samples, out, processes, device, dtype, as_json)


@joint.command(cls=Command)
def conversations(
    name: JointName = "shapes",
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Conversations in LLaVA-Instruct's format (.json).")
    ] = None,
    images: Folder = None,
    count: Count = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 64,
    out: OutFolder = Path("mllm-fast-conversations"),
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show conversations side by side: a dataset's, the language model's alone, and through the joint model."""
    with progress("loading the libraries"):
        from ..evaluation.joint.conversations import Conversations, llava_conversations, scene_conversations
    if (data is None) != (images is None):
        raise InputError("conversations of your own need their file and the images: give --data and --images")
    if data is not None and images is not None:
        samples = llava_conversations(data, images, count)
    else:
        samples = scene_conversations(10 if count is None else count, seed)
    run_evaluation(Conversations(name, max_new_tokens), samples, out, processes, device, dtype, as_json)


def run_evaluation(
    evaluation: JointEvaluation | ReverseQuality,
    samples: Samples,
    out: Path,
    processes: int,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Run an evaluation with the language model of its joint model, and publish its report."""
    from ..evaluation.report import check_charts, noted
    from ..evaluation.rows import SETTINGS
    from ..evaluation.run import run
    from ..evaluation.worker import ModelChoice
    from ..joint.checkpoint import joint_folder, part_names
    from ..models.provenance import made_with

    check_charts()
    choice = ModelChoice(part_names(joint_folder(evaluation.name_of_joint))[1], device, dtype)
    with loading(evaluation.name_of_joint):
        vlm = choice.load(progress=None)
    folder = out / evaluation.name
    with bar(evaluation.name) as tell:
        rows = run(evaluation, samples, choice, folder, processes, tell, vlm)
    report = noted(evaluation.report(rows), samples.notes)
    publish([(report, json.loads((folder / SETTINGS).read_text()))], out, as_json, made_with(vlm.model))
