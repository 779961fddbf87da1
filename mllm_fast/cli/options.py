"""Shared parts of the commands: their options, loading a model, and progress on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape

from ..core.assets import EMBEDDED, EMBEDDED_VIDEO, SAMPLE, SAMPLE_VIDEO
from ..core.errors import InputError
from ..core.video import MAX_FRAMES, Video, is_video
from .config import MODEL_VARIABLE
from .ranks import divided

if TYPE_CHECKING:
    from ..joint.model import JointModel
    from ..vlm import VLM

_ANIMATED = (".gif", ".webp", ".png")
_SAMPLE_QUESTION = "What color is the star?"
_SAMPLE_VIDEO_QUESTION = "What color is the star at the end?"
_QUESTION, _VIDEO_QUESTION = "Describe the image.", "Describe the video."
OUT = Console()
ERR = Console(stderr=True)


class Reading(NamedTuple):
    """Which frames of videos are read; see `Video`."""

    fps: float | None = None
    frames: int | None = None
    as_images: bool = False
    most: int = MAX_FRAMES

    def of(self, names: Sequence[str], every: bool = False) -> list[Any]:
        """Return files and URLs as they are, and videos as `Video`s.

        Args:
            names: The files and URLs.
            every: Whether all of them are videos; animated pictures are if frames are chosen.

        Raises:
            InputError: Frames are chosen, and there is no video.
        """
        chosen = self != Reading()
        animated = every or (chosen and not any(map(is_video, names)))
        if animated and not every and not all(name.lower().endswith(_ANIMATED) for name in names):
            raise InputError("--fps, --frames, --frame-limit and --frames-as-images are of videos, and none is given")
        return [
            Video(name, self.fps, self.frames, as_images=self.as_images or None, max_frames=self.most)
            if animated or is_video(name)
            else name
            for name in names
        ]


Images = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE",
        help="The images and videos of one prompt, files or URLs; the sample image if there is none.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        help="How many frames are read of a video (or of an animated image); by default what the model's processor"
        " says, or 8.",
        show_default=False,
    ),
]
Fps = Annotated[float | None, typer.Option("--fps", help="How many frames a second are read.", show_default=False)]
AsImages = Annotated[
    bool,
    typer.Option(
        "--frames-as-images", help="Read each frame as an image, as models without a video processor do anyway."
    ),
]
MaxFrames = Annotated[int, typer.Option("--frame-limit", help="The most frames that are read of a video.")]
Question = Annotated[str | None, typer.Option("--question", "-q", help="The prompt.")]
Model = Annotated[
    str,
    typer.Option(
        envvar=MODEL_VARIABLE, help="The model: 'shapes' (the embedded one; 'clips' for videos), a folder, or a hub id."
    ),
]
ContextModel = Annotated[
    str | None,
    typer.Option(
        envvar=MODEL_VARIABLE,
        help="The model, by default the one that the context names: as in compress.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="The device: cpu, cuda, cuda:N, or auto, which keeps what does not fit the GPU on the CPU."),
]
Dtype = Annotated[
    str | None, typer.Option(help="The number type: float32, bfloat16 or float16. The default is float32 on the CPU.")
]
Tp = Annotated[
    int | None,
    typer.Option(
        "--tp",
        help="Divide the model between so many processes (tensor parallelism), each on a GPU of its own if there are"
        " GPUs.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NewTokens = Annotated[
    int | None,
    typer.Option(help="The longest answer, in tokens; by default what the checkpoint says, or 32.", show_default=False),
]
Backend = Annotated[str, typer.Option(help="The kernels' backend: auto, triton, cpu or torch; see info.")]
Block = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RULE",
        help='What may not attend to what, in quotes: "image->query", "image:1->query+generated",'
        ' "5,9-12->generated"; "@from 4" behind it for layers of its own. May be given several times.',
    ),
]
Layers = Annotated[str, typer.Option(help='Layers of the rules: all, "from 20", "until 20", "except 20-40", 0-7,12.')]
Prefix = Annotated[
    str | None,
    typer.Option(help='Words with which the answer begins, "The color of the star is"; it goes on after them.'),
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Ask without the chat template, as in --question 'Q: What color is the star? A:'."),
]
ZeroInputs = Annotated[
    bool,
    typer.Option(
        "--zero-inputs", help="In layers without attention (hybrid models), give zeros in place of the rules' source."
    ),
]
MaxPixels = Annotated[int, typer.Option(help="The largest image that is read, in pixels.")]


def inputs(
    images: list[str] | None, question: str | None, frames: Reading | None = None, model: str = EMBEDDED
) -> tuple[list[Any], str]:
    """Return the images and videos and the prompt, with defaults: the sample and a question about it.

    Args:
        images: The files and URLs.
        question: The prompt.
        frames: Which frames of videos are read.
        model: The model: that for videos has a sample of its own.

    Raises:
        InputError: Frames are chosen, and there is no video.
    """
    frames = frames or Reading()
    if not images:
        clips = model == EMBEDDED_VIDEO
        asked = (_SAMPLE_VIDEO_QUESTION if clips else _SAMPLE_QUESTION) if question is None else question
        return frames.of([str(SAMPLE_VIDEO if clips else SAMPLE)], clips), asked
    found = frames.of(images)
    usual = _VIDEO_QUESTION if any(isinstance(one, Video) for one in found) else _QUESTION
    return found, usual if question is None else question


def tell_cut(answers: Sequence[Any]) -> None:
    """Tell on stderr how many of some answers (or explanations) were cut at the largest number of tokens."""
    cut = [len(one.tokens) for one in answers if one.finish_reason == "length"]
    if cut:
        which = "the answer was" if len(answers) == 1 else f"{len(cut)} of {len(answers)} answers were"
        ERR.print(f"{which} cut at {max(cut)} tokens; --max-new-tokens gives more", highlight=False)


def source(ctx: typer.Context, name: str) -> int:
    """Return where the value of an option comes from: 0 its default, 1 the config file, 2 the environment, 3 the line.

    Args:
        ctx: The command's context.
        name: The name of the option's parameter.
    """
    found = ctx.get_parameter_source(name)
    return ("DEFAULT", "DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE").index(found.name) if found is not None else 0


def joint_of(ctx: typer.Context, joint: str | None, model: str) -> str | None:
    """Return the joint model that answers, or None if it is the option --model that counts.

    Of a default in the config file or the environment and an option that is given, the option counts.

    Raises:
        InputError: Both are given in the same place.
    """
    if joint is None:
        return None
    places = source(ctx, "joint"), source(ctx, "model")
    if places[0] == places[1] and joint != model:
        raise InputError("a joint model has a language model of its own: give --joint or --model, not both")
    return joint if places[0] >= places[1] else None


def tell_embedded(name: str, option: str = "--model") -> None:
    """Tell on stderr what the embedded model knows, if it is the one that answered.

    Args:
        name: The name of the model that answered.
        option: The option that gives another one.
    """
    if name in (EMBEDDED, EMBEDDED_VIDEO):
        ERR.print(embedded_note(option), style="dim", highlight=False, soft_wrap=True)


def embedded_note(option: str = "--model") -> str:
    """Return what is told of the embedded model."""
    return f"the embedded model knows coloured shapes alone; give your own with {option}"


def load(
    model: str, device: str | None, dtype: str | None, max_pixels: int, backend: str, tp: int | None = None
) -> VLM:
    """Load a model and show the progress on stderr.

    With `tp` above 1 the command goes on in so many processes, see `ranks.divided`.
    """
    several = divided(tp, device)
    with progress("loading the libraries"):
        from ..vlm import VLM
    with loading(model):
        return VLM.from_pretrained(
            model, device=device, dtype=dtype, max_pixels=max_pixels, backend=backend, tp=tp if several else None
        )


def load_joint(name: str, device: str | None, dtype: str | None, max_pixels: int, backend: str) -> JointModel:
    """Load a joint model and show the progress on stderr."""
    with progress("loading the libraries"):
        from ..joint.model import JointModel
    with loading(name):
        return JointModel.from_pretrained(name, device=device, dtype=dtype, max_pixels=max_pixels, backend=backend)


@contextmanager
def loading(*names: str) -> Iterator[None]:
    """Show on stderr which models are loaded, if stderr is a terminal.

    The download and the weights of a model have progress bars of transformers and the hub. They stand below a line that
    stays, since a status that moves would overwrite them.
    """
    what = f"loading {' and '.join(dict.fromkeys(names))}"
    if ERR.is_terminal and not set(names) <= {EMBEDDED, EMBEDDED_VIDEO}:
        ERR.print(escape(what), style="dim", highlight=False, soft_wrap=True)
        yield
    else:
        with progress(what):
            yield


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show on stderr what the command is doing, if stderr is a terminal."""
    if ERR.is_terminal:
        with ERR.status(escape(what)):
            yield
    else:
        yield
