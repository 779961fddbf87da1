"""Is the map right? `python benchmarks/fidelity.py`: maps of held-out scenes against the objects' masks.

For colour and for shape questions, among those answered right, and for each kind of map:
- hit: the highest patch touches the asked object's mask;
- inside: share of the map's positive mass on patches that touch the mask;
- flips: share of answers that change when the 5 % highest patches are blanked to the background.
Controls: chance (share of patches that touch the mask), and blanking as many random patches.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from harness import machine, write_result

import mllm_fast as mf
from mllm_fast.shapes.evaluate import Asker
from mllm_fast.shapes.questions import TASKS, ask
from mllm_fast.shapes.scenes import Scene, generate_scene

METHODS = {
    "ten best heads": {"heads": 10},
    "best head": {"heads": 1},
    "mean attention": {"method": "attention"},
}


def touches(scene: Scene, target: int, grid: tuple[int, int]) -> np.ndarray:
    """Patches with at least one pixel of the object's mask, bool [rows, cols]."""
    mask = scene.objects[target].mask
    rows, cols = grid
    return mask.reshape(rows, mask.shape[0] // rows, cols, mask.shape[1] // cols).any((1, 3))


def blank(scene: Scene, patches: np.ndarray) -> Scene:
    """The scene with these patches (bool [rows, cols]) painted in the background's tone."""
    size = scene.pixels.shape[0] // patches.shape[0]
    pixels = scene.pixels.copy()
    pixels[np.kron(patches, np.ones((size, size), bool))] = scene.background
    return Scene(pixels, scene.objects, scene.background)


def highest(values: np.ndarray, count: int) -> np.ndarray:
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(values.shape)


def measure(vlm: mf.VLM, task: str, count: int, seed: int, norm: str) -> dict:
    rng = np.random.default_rng([seed, TASKS.index(task)])
    hits = {name: [] for name in METHODS}
    inside = {name: [] for name in METHODS}
    blanked: dict[str, list[Scene]] = {name: [] for name in [*METHODS, "random"]}
    asked, said, chance = [], [], []
    drawn = 0
    while drawn < count:
        scene = generate_scene(rng)
        question = ask(scene, rng, task)
        if question is None:
            continue
        drawn += 1
        ex = vlm.explain(scene.image, question.text, final_norm=norm)
        if ex.text != question.answer:
            continue
        on = touches(scene, question.target, ex.layout.images[0].grid)
        few = round(0.05 * on.size)
        chance.append(on.mean())
        for name, options in METHODS.items():
            values = ex.heatmap(0, **options).numpy()
            hits[name].append(on.flat[values.argmax()])
            positive = values.clip(min=0)
            inside[name].append(positive[on].sum() / max(positive.sum(), 1e-12))
            blanked[name].append(blank(scene, highest(values, few)))
        blanked["random"].append(blank(scene, highest(rng.random(on.shape), few)))
        asked.append([question.text])
        said.append(question.answer)
    answer = Asker(vlm.model, vlm.processor)
    flips = {
        name: float(np.mean([a != b for a, b in zip(answer(scenes, asked), said, strict=True)]))
        for name, scenes in blanked.items()
    }
    rows = {
        name: {"hit": float(np.mean(hits[name])), "inside": float(np.mean(inside[name])), "flips": flips[name]}
        for name in METHODS
    }
    return {
        "scenes": drawn,
        "right": len(said),
        "chance": float(np.mean(chance)),
        "random flips": flips["random"],
        **rows,
    }


def pooled(*parts: dict) -> dict:
    """The figures over the scenes of several measurements, each scene answered right on_weights the same."""
    weights = [part["right"] for part in parts]
    mean = lambda values: float(np.average(values, weights=weights))  # noqa: E731
    row: dict = {name: sum(part[name] for part in parts) for name in ("scenes", "right")}
    row |= {name: mean([part[name] for part in parts]) for name in ("chance", "random flips")}
    for name in METHODS:
        row[name] = {figure: mean([part[name][figure] for part in parts]) for figure in ("hit", "inside", "flips")}
    return row


def report(task: str, norm: str, row: dict) -> None:
    print(
        f"{task}, {norm} norm: {row['right']} of {row['scenes']} answered right; chance {row['chance']:.3f};"
        f" random patches flip {row['random flips']:.3f}"
    )
    for name in METHODS:
        r = row[name]
        print(
            f"  {name:15s} hit {r['hit']:.3f}  inside {r['inside']:.3f}"
            f" ({r['inside'] / row['mean attention']['inside']:.2f} x mean attention)  flips {r['flips']:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--scenes", type=int, default=500, help="questions a task")
    parser.add_argument("--seed", type=int, default=31_337)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(2)
    vlm = mf.VLM.from_pretrained(args.model, device="cpu")
    result: dict = {"benchmark": "fidelity", "machine": machine(), "seed": args.seed}
    for norm in ("frozen", "own"):
        rows = {task: measure(vlm, task, args.scenes, args.seed, norm) for task in ("color", "shape")}
        rows["both"] = pooled(rows["color"], rows["shape"])
        for task, row in rows.items():
            result[f"{task}, {norm}"] = row
            report(task, norm, row)
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
