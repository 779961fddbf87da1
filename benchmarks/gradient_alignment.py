"""Gradient alignment at the sizes of OWL-ViT base: `python benchmarks/gradient_alignment.py`.

577 tokens of 768 numbers, random weights, float32, one text query. Contenders: ours (one forward-mode product, norms
from the last layer's structure); one backward pass a box (576); the released way, one backward pass a box for the class
logit and for each of four coordinates (2,880). Each stands behind the gate: in float64 ours equals the loop to 1e-6.
The loops take minutes, so a part of their passes, chosen evenly, is timed and the whole follows by count; `--whole`
runs them all. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import in_turn, machine, median, peak_bytes, write_result
from torch import Tensor
from transformers import OwlViTConfig, OwlViTForObjectDetection

from mllm_fast.joint.detector import Detector
from mllm_fast.joint.last_layer import row_by_row, structured

_COORDINATES = 4


def random_detector() -> Detector:
    """OWL-ViT base, patch 32, with random weights and two layers: the last one alone takes part."""
    torch.manual_seed(0)
    config = OwlViTConfig(vision_config={"num_hidden_layers": 2}, text_config={"num_hidden_layers": 1})
    model = OwlViTForObjectDetection(config)
    for head in (model.class_head, model.box_head):
        for part in head.modules():
            if isinstance(part, torch.nn.Linear):
                torch.nn.init.normal_(part.weight, std=part.in_features**-0.5)
    return Detector(model, None)


def by_backward(detector: Detector, tokens: Tensor, query: Tensor, direction: Tensor, passes: Sequence[int]) -> Tensor:
    """cos of the class logits' gradients of some boxes with the direction; pass i is of box i // 5 where there are
    coordinates, which are taken and left, as the released scripts do."""
    leaf = tokens.clone().requires_grad_()
    features = detector.features(leaf)
    outputs = [detector.logits(features, query[None])[:, :1]]
    if len(passes) and max(passes) >= len(features):
        outputs.append(detector.model.box_head(features))
    values = torch.cat(outputs, 1)
    found = []
    for i in passes:
        box, column = divmod(i, values.shape[1])
        (gradient,) = torch.autograd.grad(values[box, column], leaf, retain_graph=True)
        if column == 0:
            found.append((gradient * direction).sum() / (gradient.norm() * direction.norm()))
    return torch.stack(found)


def gate(detector: Detector, tokens: Tensor, query: Tensor, direction: Tensor) -> dict[str, float]:
    """Largest relative differences in float64: of the norms, and of the dot products in units of norm times norm."""
    detector.model.double()
    wide = [one.double() for one in (tokens, query, direction)]
    ours = structured(detector, *wide)
    boxes = range(0, len(tokens) - 1, 9)
    leaf = wide[0].clone().requires_grad_()
    logits = detector.logits(detector.features(leaf), wide[1][None])[:, 0]
    norm = dot = 0.0
    for box in boxes:
        (gradient,) = torch.autograd.grad(logits[box], leaf, retain_graph=True)
        length = float(gradient.norm())
        norm = max(norm, abs(float(ours.norms[box]) - length) / length)
        expected = float((gradient * wide[2]).sum())
        dot = max(dot, abs(float(ours.dots[box]) - expected) / abs(expected))
    detector.model.float()
    single = structured(detector, tokens, query, direction)
    return {
        "boxes": len(boxes),
        "norms": norm,
        "dots": dot,
        "float32_norms": float(((single.norms.double() - ours.norms) / ours.norms).abs().max()),
        "float32_cosines": float(
            (single.dots.double() / single.norms.double() - ours.dots / ours.norms).abs().max() / wide[2].norm()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="run the loops whole, once")
    parser.add_argument("--out", type=Path, help="write the result file here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    detector = random_detector()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(577, 768, generator=generator)
    query, direction = torch.randn(512, generator=generator), torch.randn(577, 768, generator=generator)
    given = detector, tokens, query, direction
    errors = gate(*given)
    if max(errors["norms"], errors["dots"]) > 1e-6:
        raise SystemExit(f"not the same as a loop of backward passes: {errors}")
    print("float64, against a loop:", {name: f"{value:.2g}" for name, value in errors.items()})
    boxes = len(tokens) - 1
    part = {"a box": list(range(0, boxes, 36)), "released": list(range(0, 5 * boxes, 180))}
    whole = {"a box": boxes, "released": (1 + _COORDINATES) * boxes}
    if args.whole:
        part = {name: list(range(count)) for name, count in whole.items()}
    contenders = {
        "ours": lambda: structured(*given),
        "a box": lambda: by_backward(*given, part["a box"]),
        "released": lambda: by_backward(*given, part["released"]),
    }
    times = in_turn(contenders, 1 if args.whole else args.rounds)
    # what a detector of another form falls back to; it takes as long as all rounds of the others, so once
    times |= in_turn({"batched": lambda: row_by_row(*given)}, 1, warm_up=0)
    seconds = {name: median(values) for name, values in times.items()}
    for name, passes in part.items():
        seconds[name] *= whole[name] / len(passes)
    peaks = {"ours": peak_bytes(contenders["ours"]), "a box": peak_bytes(contenders["a box"])}
    result = {
        "benchmark": "gradient alignment",
        "machine": machine(),
        "sizes": {"tokens": 577, "width": 768, "boxes": boxes},
        "errors": errors,
        "seconds": seconds,
        "timed_passes": {name: len(passes) for name, passes in part.items()},
        "passes": whole,
        "times_faster_than_released": seconds["released"] / seconds["ours"],
        "times_faster_than_a_box": seconds["a box"] / seconds["ours"],
        "peak_mib": {name: size / 2**20 for name, size in peaks.items()},
    }
    for name, value in seconds.items():
        print(f"{name:10s} {value:9.3f} s  {value / seconds['ours']:8.1f} x")
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
