"""What the embedded joint model is worth: `python benchmarks/joint.py --folder F`.

The five evaluations of `mllm-fast joint` and `mllm-fast detect --report` on generated scenes that no training drew, as
one result file: answers and boxes, gradient alignment's heaviest pixels, maps told apart, hallucinations on pictures
made worse, and red swapped for blue. Prints each report's sentences and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness import machine, write_result

from mllm_fast.evaluation.joint.bias import Bias, Swap, swap_scenes
from mllm_fast.evaluation.joint.hallucination import Hallucination
from mllm_fast.evaluation.joint.pointing import Pointing
from mllm_fast.evaluation.joint.quality import JointQuality
from mllm_fast.evaluation.joint.simulatability import Simulatability
from mllm_fast.evaluation.report import plain, save
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.worker import ModelChoice
from mllm_fast.joint.checkpoint import WEIGHTS, joint_folder
from mllm_fast.shapes.evaluate import SEED, weights_digest
from mllm_fast.shapes.scenes import COLORS, SHAPES

JOINT = "shapes"
CLASSES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def query(color: str) -> tuple[str]:
    return (f"a photo of a {color} object",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--degraded", type=int, default=200, help="scenes, each in 13 versions, for hallucinations")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="of rows and reports; used again, it goes on")
    parser.add_argument("--chart", type=Path, help="write the chart of the detector's scores here")
    parser.add_argument("--out", type=Path, help="write the result file here")
    args = parser.parse_args()
    held_out = scenes(args.scenes, SEED)
    swapped = swap_scenes(min(500, args.scenes), SEED, "red", "blue")
    jobs = (
        (JointQuality([JOINT], CLASSES), held_out),
        (Pointing(JOINT), held_out),
        (Simulatability(JOINT), held_out),
        (Hallucination(JOINT, list(SHAPES), STRENGTHS), scenes(args.degraded, SEED)),
        (Bias(JOINT, Swap(query("red"), query("blue")), Swap(query("green"), query("yellow"))), swapped),
    )
    result = {
        "benchmark": "joint",
        "machine": machine() | {"processes": args.processes},
        "scenes": args.scenes,
        "seed": SEED,
        "detector_sha256": weights_digest(joint_folder(JOINT) / "detector"),
        "alignment_sha256": weights_digest(joint_folder(JOINT), WEIGHTS),
    }
    for evaluation, samples in jobs:
        folder = args.folder / evaluation.name
        tell = lambda done, total: print(f"{done} of {total}", end="\r", flush=True)  # noqa: E731
        rows = run(evaluation, samples, ModelChoice(), folder, args.processes, tell)
        report = evaluation.report(rows)
        save(report, folder, {"scenes": len(rows)})
        print(f"{report.title} {' '.join(report.says)}")
        result[evaluation.name] = plain(report.figures)
        if args.chart is not None and evaluation.name == Hallucination.name:
            args.chart.write_bytes(report.charts[0].png())
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
