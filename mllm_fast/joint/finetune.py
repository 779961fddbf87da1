"""Fine-tune the language model to read the detector's embedding.

This trains W and low-rank adapters (LoRA, arXiv 2106.09685) of the language model's attention. The targets are the
answers that the language model gives from its own image embeddings. arXiv 2405.14612 leaves this direction open.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import EndsRunError, InputError, check_choice
from ..core.files import write_whole
from ..models.offload import device_of
from .checkpoint import WEIGHTS, write_settings
from .image_features import given_features
from .lora import adapted_model
from .train import PRECISIONS, Tell, schedule
from .weights_id import weights_name

if TYPE_CHECKING:
    from .model import JointModel
    from .training_data import Pictures

LORA, LOSSES = "lora", "finetune.json"


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run.

    Attributes:
        prompts: The prompts; each image gets one of them.
        rank: The rank of the adapters.
        epochs: Passes over the images.
        batch: Images per step of the optimiser.
        rate: AdamW's learning rate, with the schedule of `TrainConfig`.
        precision: "no", "bf16" or "fp16".
        max_new_tokens: The largest number of tokens in an answer.
        seed: The seed of the adapters and of the order of the images.
    """

    prompts: tuple[str, ...] = ("Describe the image.",)
    rank: int = 8
    epochs: int = 1
    batch: int = 8
    rate: float = 1e-4
    precision: str = "no"
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        if not self.prompts:
            raise InputError("give at least one prompt")
        for name in ("rank", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, got {getattr(self, name)}")


def finetune(
    joint: JointModel,
    names: tuple[str, str],
    pictures: Pictures,
    out: Path,
    config: FinetuneConfig,
    tell: Tell = lambda done, total, what: None,
) -> list[float]:
    """Fine-tune a joint model on images and write the result to a folder.

    The folder gets W, the adapters and the losses. `joint` itself is unchanged afterwards.

    Args:
        joint: The joint model to start from.
        names: The names of the detector and of the language model, as they are written to the folder.
        pictures: The images.
        out: The folder.
        config: The settings of the run.
        tell: Called with the progress after each step.

    Returns:
        The losses, one per step.

    Raises:
        InputError: If there are too few images, if the folder holds a joint model, or if `joint` is fine-tuned already.
        EndsRunError: If no image of a step can be used.
    """
    if (out / WEIGHTS).exists():
        raise InputError(f"{out}: holds a trained alignment; give another folder, or remove it")
    if "finetuned" in joint.alignment.about:
        raise InputError("this joint model is fine-tuned already; fine-tune the one that it came from, for longer")
    if len(pictures) < config.batch:
        raise InputError(f"{len(pictures)} images are too few for a batch of {config.batch}; give more")
    vlm = joint.vlm
    base = weights_name(vlm.model)
    weights = {name: tensor.detach().clone() for name, tensor in joint.alignment.state_dict().items()}
    steps = config.epochs * (len(pictures) // config.batch)
    out.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    with adapted_model(vlm, config.rank, config.seed) as adapted:
        try:
            trained = [*joint.alignment.parameters(), *(p for p in adapted.parameters() if p.requires_grad)]
            optimizer = torch.optim.AdamW(trained, config.rate, weight_decay=0.0)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = config.rate * schedule(step, steps)
                losses.append(_step(joint, adapted, pictures, config, step))
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                tell(step + 1, steps, f"loss {losses[-1]:.4f}")
            adapted.save_pretrained(str(out / LORA))
            about = {"config": asdict(config), "pictures": pictures.origin, "base": base}
            alignment = joint.alignment
            pair, before = alignment.pair, alignment.about
            # `pair` omits the language model, because adapters change it: `merged` checks its base weights instead
            alignment.pair, alignment.about = {"owl": weights_name(joint.owl.model)}, {**before, "finetuned": about}
            try:
                write_whole(out / LOSSES, (json.dumps({"losses": losses, **about}, indent=1) + "\n").encode())
                write_settings(out, *names, joint.view, lora=LORA)
                alignment.save(out / WEIGHTS)  # written last: a folder with it is complete
            finally:
                alignment.pair, alignment.about = pair, before
        finally:
            joint.alignment.load_state_dict(weights)
    return losses


def _step(joint: JointModel, adapted: Any, pictures: Pictures, config: FinetuneConfig, step: int) -> float:
    """Run the backward passes of one batch and return its mean loss."""
    an_epoch = len(pictures) // config.batch
    order = np.random.default_rng([config.seed, step // an_epoch]).permutation(len(pictures))
    start = step % an_epoch * config.batch
    total, used, why = 0.0, 0, ""
    for number in order[start : start + config.batch]:
        try:
            picture = pictures[int(number)]
            seen = joint.see(picture)
        except (InputError, OSError) as error:
            why = str(error)
            continue
        prompt = config.prompts[int(number) % len(config.prompts)]
        with adapted.disable_adapter():
            answer = joint.vlm.generate(picture, prompt, max_new_tokens=config.max_new_tokens, do_sample=False)
        loss = _loss(joint, adapted, seen, answer.input_ids, answer.layout.prompt_length, prompt, config.precision)
        (loss / config.batch).backward()
        total, used = total + loss.item(), used + 1
    if not used:
        raise EndsRunError(f"no image of a batch can be used: {why}")
    return total / used


def _loss(
    joint: JointModel, adapted: Any, seen: Any, sequence: Tensor, start: int, prompt: str, precision: str
) -> Tensor:
    """Return the cross-entropy of an answer, given the detector's embedding of the image."""
    vlm = joint.vlm
    inputs, _, _ = vlm.prompts.prepare([[seen.vision.picture]], [prompt])
    device = device_of(vlm.model)
    ids = sequence.to(device)
    if ids[-1] != vlm.processor.tokenizer.eos_token_id:  # the end token is part of an answer
        ids = torch.cat([ids, ids.new_tensor([vlm.processor.tokenizer.eos_token_id])])
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.inference_mode(False), torch.enable_grad():
        seen = seen.with_tokens(seen.vision.tokens.clone())
        mixed = torch.autocast(device.type, kinds[precision]) if precision in kinds else nullcontext()
        with mixed, given_features(vlm, joint.image_embeddings(seen)[None]):
            output = adapted(
                input_ids=ids[None, :-1].clone(),
                attention_mask=torch.ones_like(ids[None, :-1]),
                pixel_values=inputs["pixel_values"].clone(),
                use_cache=False,
                logits_to_keep=len(ids) - start,
            )
        return torch.nn.functional.cross_entropy(output.logits[0].float(), ids[start:].clone())
