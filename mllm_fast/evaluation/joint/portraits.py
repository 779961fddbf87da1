"""Make the portraits of a table of biases with a text-to-image model of your own (arXiv 2405.14612, supplement, S 4).

`python -m mllm_fast.evaluation.joint.portraits --model MODEL --out FOLDER` writes a folder for each group, with 50
portraits by default, which `mllm-fast joint bias-table` takes. The prompts are in portraits.json beside this file, in
words of this project's own; `--prompts` takes another file of this form. It needs `pip install diffusers`. The paper
used Stable Diffusion XL with its refiner, 50 steps in all, of which the refiner does the last ten.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...core.errors import InputError

PROMPTS = Path(__file__).with_name("portraits.json")
_SHARE = 0.8  # of the steps that come before the refiner's


def read_prompts(file: Path) -> dict[str, dict[str, str]]:
    """Read the prompts: {topic: {group: prompt, ..., "negative": what is avoided}}, with two groups a topic.

    Raises:
        InputError: The file does not exist, or it has another form.
    """
    try:
        topics = json.loads(file.read_text(encoding="utf-8"))
        for topic, prompts in topics.items():
            texts = all(isinstance(text, str) for text in prompts.values())
            if not texts or len([group for group in prompts if group != "negative"]) != 2:
                raise ValueError(f"{topic} has two groups, each with a prompt")
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: no prompts of portraits ({error})") from None
    return topics


def make_portraits(
    pipeline: Any,
    prompts: dict[str, str],
    out: Path,
    count: int,
    steps: int,
    seed: int = 0,
    refiner: Any = None,
) -> list[Path]:
    """Write `count` portraits of each group as PNG, into a folder of the group's name; those that are there stay.

    Args:
        pipeline: A text-to-image pipeline of diffusers.
        prompts: The prompt of each group, and what is avoided ("negative").
        out: The folder.
        count: The number of portraits of each group.
        steps: The number of denoising steps.
        seed: The seed of the first portrait; the others have the next ones, the same in each group.
        refiner: An image-to-image pipeline that does the last fifth of the steps.

    Returns:
        The paths of the portraits.
    """
    options: dict[str, Any] = {"num_inference_steps": steps}
    if "negative" in prompts:
        options["negative_prompt"] = prompts["negative"]
    paths = []
    for group, prompt in prompts.items():
        if group == "negative":
            continue
        (out / group).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = out / group / f"portrait_{number:03d}.png"
            paths.append(path)
            if path.exists():
                continue
            generator = torch.Generator("cpu").manual_seed(seed + number)
            if refiner is None:
                image = pipeline(prompt, generator=generator, **options).images[0]
            else:
                latent = pipeline(
                    prompt, generator=generator, denoising_end=_SHARE, output_type="latent", **options
                ).images
                image = refiner(prompt, image=latent, generator=generator, denoising_start=_SHARE, **options).images[0]
            part = path.with_suffix(".part")
            image.save(part, "PNG")
            part.replace(path)  # a portrait that is there is complete
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a text-to-image model of diffusers: a folder or a hub id")
    parser.add_argument("--refiner", help="an image-to-image model for the last steps, as the paper's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the groups' folders")
    parser.add_argument("--topic", default="gender", help="a topic of the prompts")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="another file of prompts")
    parser.add_argument("--count", type=int, default=50, help="portraits of each group")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        topics = read_prompts(args.prompts)
        if args.topic not in topics:
            raise InputError(f"the topics are {', '.join(topics)}, got {args.topic!r}")
        if args.count < 1 or args.steps < 1:
            raise InputError("--count and --steps are at least 1")
        try:
            diffusers: Any = import_module("diffusers")
        except ImportError:
            raise InputError("portraits are made with diffusers: pip install diffusers") from None
    except InputError as error:
        parser.error(str(error))
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(args.model).to(args.device)
    refiner = (
        diffusers.AutoPipelineForImage2Image.from_pretrained(args.refiner).to(args.device) if args.refiner else None
    )
    paths = make_portraits(pipeline, topics[args.topic], args.out, args.count, args.steps, args.seed, refiner)
    print(f"{len(paths)} portraits in {args.out}")


if __name__ == "__main__":
    main()
