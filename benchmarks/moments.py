"""Which moment of a video, and where in it: `python benchmarks/moments.py`.

The evaluation `mllm-fast eval moments` over generated clips that the embedded video model never saw, beside its
accuracy table. The gate: the table is of the weights at hand, and each answer of the model under no knockout is that of
`VLM.generate`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from harness import machine, write_result

import mllm_fast as mf
from mllm_fast.core.assets import CLIPS_WEIGHTS
from mllm_fast.evaluation.studies.moments import Moments
from mllm_fast.evaluation.videos import clips
from mllm_fast.shapes.clips import FPS
from mllm_fast.shapes.evaluate import weights_digest
from mllm_fast.shapes.evaluate_clips import TABLE

SEED = 77_112  # differs from the seeds of training and of the accuracy table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--out", type=Path, default=None, help="also write the result to this file")
    args = parser.parse_args()
    accuracy = json.loads(TABLE.read_text())
    if accuracy["weights_sha256"] != weights_digest(CLIPS_WEIGHTS):
        sys.exit("the accuracy table is of other weights: python -m mllm_fast.shapes.evaluate_clips --write")
    torch.set_num_threads(1)
    vlm, study, rows = mf.VLM.from_pretrained("clips"), Moments(), {}
    for sample in clips(args.clips, SEED).list:
        rows[sample.name] = study.rows(vlm, sample)
        (row,) = rows[sample.name]
        said = vlm.generate(mf.Video(sample.source.frames, frame_rate=FPS), row["question"], max_new_tokens=16)
        if said.text != row["said"]:
            sys.exit(f"the gate is not passed: {sample.name} is answered {said.text!r} and {row['said']!r}")
    report = study.report(rows)
    print(*report.says, sep="\n")
    for table in report.tables:
        print(table.title, table.columns, *table.rows, sep="\n  ")
    result = {
        "benchmark": "moments",
        "machine": machine(),
        "seed": SEED,
        "figures": report.figures,
        "accuracy": accuracy,
    }
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
