"""Which way of drawing a map is right? `python benchmarks/maps.py`: `mllm-fast eval fidelity` on the embedded model and
200 generated scenes, as a result file. Prints the report's sentences and ends with a line of JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness import machine, write_result

from mllm_fast.evaluation.report import save
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.studies.fidelity import Fidelity
from mllm_fast.evaluation.worker import ModelChoice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="of the rows and the report; used again, it goes on")
    parser.add_argument("--chart", type=Path, help="write the chart here")
    parser.add_argument("--out", type=Path, help="write the result file here")
    args = parser.parse_args()
    evaluation = Fidelity()
    tell = lambda done, total: print(f"{done} of {total}", end="\r", flush=True)  # noqa: E731
    rows = run(evaluation, scenes(args.scenes), ModelChoice(), args.folder, args.processes, tell)
    report = evaluation.report(rows)
    save(report, args.folder, {"scenes": args.scenes})
    print(*report.says, sep="\n")
    result = {
        "benchmark": "maps",
        "machine": machine() | {"processes": args.processes},
        "scenes": args.scenes,
        **report.figures,
    }
    if args.chart is not None:
        args.chart.write_bytes(report.charts[0].png())
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
