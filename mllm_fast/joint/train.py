"""Train W without labels (arXiv 2405.14612, supplement).

W maps the detector's embedding of an image to the language model's own embeddings of that image. Both models stay
unchanged.

Several GPUs, mixed precision and gradient accumulation come from accelerate: `accelerate launch -m mllm_fast.cli joint
train ...`. A stopped run leaves its progress in `checkpoint.safetensors`. The same command continues from there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..core.errors import EndsRunError, InputError, check_choice
from ..core.extras import install_command
from ..core.files import write_whole
from .alignment import Alignment, AlignmentConfig
from .checkpoint import DIRECTIONS, FORWARD, WEIGHTS, write_settings
from .reverse import reverse_embeddings
from .training_data import Pictures, embeddings
from .weights_id import weights_name
from .whole_image import VIEWS, WHOLE, sees_whole

if TYPE_CHECKING:
    from ..vlm import VLM
    from .detector import Detector

CHECKPOINT, CURVE = "checkpoint.safetensors", "curve.json"
PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("cosine", "constant")
Tell = Callable[[int, int, str], None]  # steps done, total steps, latest measurements in words


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run of W.

    Attributes:
        epochs: Passes over the images.
        batch: Images per batch on each device.
        accumulate: Batches per device in one step of the optimiser.
        rate: AdamW's learning rate.
        precision: "no", "bf16" or "fp16", the precision of the multiplications.
        held_out: The share of the images that W is only measured on; at most 256 images are used.
        every: Steps between two measurements. Each measurement also writes a checkpoint.
        seed: The seed of the weights, the order of the images and the noise.
        noise: The largest strength of the noise that is added to E, as a share of E's standard deviation. With noise,
            W learns an output that changes smoothly with E.
        view: What of an image the language model sees, as in `JointModel`.
        schedule: "cosine" warms the rate up over 3 % of the steps, then lets it fall to a hundredth. "constant" keeps
            it, as in the paper's scripts.
        direction: What is mapped to what, see `DIRECTIONS`: E to the language model's image embeddings, or the
            language model's own vision embedding to E.
    """

    epochs: int = 1
    batch: int = 16
    accumulate: int = 1
    rate: float = 1e-4
    precision: str = "no"
    held_out: float = 0.02
    every: int = 200
    seed: int = 0
    noise: float = 0.0
    view: str = WHOLE
    schedule: str = "cosine"
    direction: str = FORWARD

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("view", self.view, VIEWS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("direction", self.direction, DIRECTIONS)
        for name in ("epochs", "batch", "accumulate", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is a share between 0 and 1, got {self.held_out}")
        if not self.rate > 0:
            raise InputError(f"rate is above 0, got {self.rate}")
        if self.noise < 0:
            raise InputError(f"noise is 0 or more, got {self.noise}")


def train(  # noqa: PLR0915  # long: one loop with what it is resumed from
    owl: Detector,
    vlm: VLM,
    names: tuple[str, str],
    pictures: Pictures,
    out: Path,
    shape: AlignmentConfig,
    config: TrainConfig,
    tell: Tell = lambda done, total, what: None,
) -> Alignment:
    """Train W and write it to a folder, with the names of the two models and the training curve.

    An image that cannot be used is skipped and counted.

    Args:
        owl: The detector.
        vlm: The language model.
        names: The names of the detector and of the language model, as they are written to the folder.
        pictures: The images.
        out: The folder.
        shape: The architecture of W.
        config: The settings of the run.
        tell: Called with the progress after each step and each measurement.

    Returns:
        W, in evaluation mode.

    Raises:
        InputError: If there are too few images, or if the folder holds a finished run or one with other settings.
        EndsRunError: If no image of a batch can be used.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        raise InputError(f"training needs accelerate: {install_command('joint')}") from None
    vlm = sees_whole(vlm) if config.view == WHOLE else vlm
    order = np.random.default_rng(config.seed).permutation(len(pictures))
    held = order[: min(256, max(1, round(config.held_out * len(order))))]
    taught = order[len(held) :]
    AcceleratorState._reset_state()  # otherwise a second run in one process keeps the first one's precision
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        cpu=owl.device.type == "cpu",
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    a_step = config.batch * config.accumulate * world
    if len(taught) < a_step:
        raise InputError(
            f"{len(order)} images are too few: {len(held)} are held out, and one step takes {a_step}; give more, or a"
            " smaller batch"
        )
    steps = config.epochs * (len(taught) // a_step)
    pair = {"owl": weights_name(owl.model), "vlm": weights_name(vlm.model)}
    settings = {"shape": asdict(shape), "config": asdict(config), "pair": pair, "pictures": pictures.origin}
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    alignment = Alignment(shape, pair, settings | {"detector": names[0], "model": names[1]})
    optimizer = torch.optim.AdamW(alignment.parameters(), config.rate, weight_decay=0.01)
    state = _State(out, settings, alignment, optimizer)
    state.resume()
    prepared, stepper = accelerator.prepare(alignment, optimizer)
    for step in range(state.step, steps):
        if step % config.every == 0:
            if accelerator.is_main_process:
                _measure(state, owl, vlm, pictures, held, config.batch)
                tell(step, steps, state.words())
            accelerator.wait_for_everyone()
        for group in stepper.param_groups:
            group["lr"] = config.rate * (schedule(step, steps) if config.schedule == "cosine" else 1.0)
        total = 0.0
        parts = _parts(taught, step, a_step, config, rank)
        for i, numbers in enumerate(parts):
            given, wanted, skipped = _usable(owl, vlm, pictures, numbers, config.direction)
            state.skipped += skipped
            given = _through_noise(given, config.noise, (config.seed, step, rank, i))
            last = i + 1 == config.accumulate
            with nullcontext() if last else accelerator.no_sync(prepared):
                with accelerator.autocast():
                    found = prepared(given.to(accelerator.device))
                loss = (found.float() - wanted.to(found.device)).square().mean()
                # accelerate divides the loss by the number of batches per step
                accelerator.backward(loss)
            total += loss.item() / config.accumulate
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        state.step, state.loss = step + 1, total if math.isnan(state.loss) else 0.9 * state.loss + 0.1 * total
        tell(step + 1, steps, state.words())
    if accelerator.is_main_process:
        _measure(state, owl, vlm, pictures, held, config.batch)
        alignment.save(out / WEIGHTS)
        write_settings(out, *names, config.view, direction=config.direction)
        (out / CHECKPOINT).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return alignment.eval()


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate that applies at a step."""
    warm_up = max(1, round(0.03 * steps))
    return min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _through_noise(given: Tensor, most: float, seed: tuple[int, ...]) -> Tensor:
    """Return E of images [B, n, d] with added noise; each image has its own random strength."""
    if not most:
        return given
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    strength = most * torch.rand(len(given), 1, 1, generator=generator) * given.std((1, 2), keepdim=True).cpu()
    return given + (strength * torch.randn(given.shape, generator=generator)).to(given.device)


def _parts(taught: np.ndarray, step: int, a_step: int, config: TrainConfig, rank: int) -> Iterator[np.ndarray]:
    """Yield the image numbers of one process in one step, batch by batch; each epoch has its own order."""
    an_epoch = len(taught) // a_step
    shuffled = np.random.default_rng([config.seed, 1, step // an_epoch]).permutation(taught)
    start = (step % an_epoch) * a_step + rank * config.batch * config.accumulate
    for i in range(config.accumulate):
        yield shuffled[start + i * config.batch : start + (i + 1) * config.batch]


def _usable(
    owl: Detector, vlm: VLM, pictures: Pictures, numbers: np.ndarray, direction: str
) -> tuple[Tensor, Tensor, int]:
    """Return the inputs and the targets of the map for the usable images, and the number of unusable ones."""
    images, why = [], ""
    for number in numbers:
        try:
            image = pictures[int(number)]
            owl.check_size(image)
            images.append(image)
        except (InputError, OSError) as error:
            why = str(error)
    if not images:
        raise EndsRunError(f"no image of a batch can be used: {why}")
    found = (embeddings if direction == FORWARD else reverse_embeddings)(owl, vlm, images)
    return *found, len(numbers) - len(images)


class _State:
    """The progress of a training run."""

    def __init__(self, out: Path, settings: dict[str, Any], alignment: Alignment, optimizer: torch.optim.Optimizer):
        self.out, self.settings, self.alignment, self.optimizer = (
            out,
            json.loads(json.dumps(settings)),
            alignment,
            optimizer,
        )
        self.step, self.skipped = 0, 0
        self.loss = math.nan  # training loss, averaged over about the last ten steps
        self.curve: list[dict[str, float]] = []

    def words(self) -> str:
        last = self.curve[-1]["distance"] if self.curve else math.nan
        return f"loss {self.loss:.4f}, distance {last:.3f}"

    def resume(self) -> None:
        """Continue a stopped run that has the same settings, if the folder holds one.

        Raises:
            InputError: If the folder holds a finished run, or one with other settings.
        """
        path = self.out / CHECKPOINT
        if not path.exists():
            if (self.out / WEIGHTS).exists():
                raise InputError(f"{self.out}: holds a trained alignment; give another folder, or remove it")
            return
        with safe_open(os.fspath(path), "pt") as file:
            head = json.loads((file.metadata() or {})["json"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if head["settings"] != self.settings:
            wrong = [name for name in self.settings if head["settings"].get(name) != self.settings[name]]
            raise InputError(f"{path}: a run of other settings ({', '.join(wrong)}); give another folder, or remove it")
        self.step, self.skipped, self.loss = head["step"], head["skipped"], head["loss"] or math.nan
        self.curve = head["curve"]
        weights = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")}
        self.alignment.load_state_dict(weights)
        parameters = list(self.alignment.parameters())
        for i, parameter in enumerate(parameters):
            if f"m.{i}" in tensors:
                moments = {"exp_avg": tensors[f"m.{i}"], "exp_avg_sq": tensors[f"v.{i}"]}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}

    def checkpoint(self) -> None:
        """Write the progress to the checkpoint file, atomically."""
        tensors = {f"w.{name}": tensor.detach().cpu() for name, tensor in self.alignment.state_dict().items()}
        for i, parameter in enumerate(self.alignment.parameters()):
            moments = self.optimizer.state.get(parameter, {})
            if moments:
                tensors |= {f"m.{i}": moments["exp_avg"].cpu(), f"v.{i}": moments["exp_avg_sq"].cpu()}
        loss = None if math.isnan(self.loss) else self.loss
        head = {
            "settings": self.settings,
            "step": self.step,
            "skipped": self.skipped,
            "loss": loss,
            "curve": self.curve,
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(self.out / CHECKPOINT, save_tensors(tensors, {"json": json.dumps(head)}))


@torch.no_grad()
def _measure(state: _State, owl: Detector, vlm: VLM, pictures: Pictures, held: np.ndarray, batch: int) -> None:
    """Measure W on the held-out images, add the result to the curve and write a checkpoint."""
    if state.curve and state.curve[-1]["step"] == state.step:
        return
    where = next(state.alignment.parameters()).device
    error = spread = cosine = 0.0
    count = 0
    for start in range(0, len(held), batch):
        given, wanted, _ = _usable(
            owl, vlm, pictures, held[start : start + batch], state.settings["config"]["direction"]
        )
        found = state.alignment(given.to(where)).to(wanted)
        error += float((found - wanted).square().sum())
        spread += float((wanted - wanted.mean((0, 1))).square().sum())
        cosine += float(torch.cosine_similarity(found, wanted, dim=-1).sum())
        count += found.shape[0] * found.shape[1]
    entry = {"step": state.step, "distance": (error / spread) ** 0.5, "cosine": cosine / count}
    state.curve.append(entry | ({} if math.isnan(state.loss) else {"loss": state.loss}))
    content = {"skipped": state.skipped, "curve": state.curve, **state.settings}
    write_whole(state.out / CURVE, (json.dumps(content, indent=1) + "\n").encode())
    state.checkpoint()
