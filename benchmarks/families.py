"""Write docs/models.md: which architectures work, from the results of tests/test_families.py on tiny random models.

python benchmarks/families.py
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
COLUMNS = {
    "test_logits_and_generation": "logits",
    "test_scores": "scores",
    "test_writes_add_up": "writes",
    "test_knockouts": "knockouts",
    "test_contexts": "contexts",
    "test_maps_that_run_the_model_again": "replays",
    "test_each_tile_covers_its_box": "heatmaps",
}
HEAD = """# Models

A model of any type works: its parts are found by what they compute when it is loaded
(`mllm-fast info --model NAME` shows them, and what works). This table has the types that the tests try, as tiny random
models of transformers' own classes, in float64. A number is the largest error against the model's own eager attention:
of logits, of scores relative to the largest score, of writes relative to what is added to the residual stream, of
logits under a knockout, of logits over a context that keeps everything, and of a replayed sequence. Heatmaps are
checked by painting squares on the image. `python benchmarks/families.py` makes this page; types that need libraries
which are not installed (the extra `compat`) are left out.

"""
TAIL = """
In models with cross-attention (Mllama) the image's keys lie outside the sequence. They generate, with knockouts and
attention shares: a row that may not attend to the image's token sees none of these keys. Explanations and contexts of
them are refused. In hybrid models (Qwen3.5, LFM2) the heads of the layers with attention are explained, and contexts
carry the state of the other layers. Knockouts leave these as they are, which a warning and `unreached_layers` say, or
give them zeros in place of the source (`Knockout(..., zero_inputs=True)`). The server does not serve hybrid models.
Models whose code does not use transformers' attention interface are refused by name when they are loaded. A type whose
processor is not known works, except for heatmaps.

Layers that a library has quantised (torchao, quanto, bitsandbytes, HQQ, GPTQ) or adapted (LoRA, DoRA) compute as they
are, and their scores are those of the dequantised, merged weights; tests/test_quantised.py compares them. Layers that
round their inputs too differ from their weights, which a warning says when the model is loaded, and by how much.
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ROOT / "tests" / "test_families.py"
        subprocess.run([Path(sys.executable).parent / "pytest", "-q", tests, f"--junitxml={report}"], cwd=ROOT)
        found = results(report)
    rows = [f"| {name} | " + " | ".join(found[name].get(c, "—") for c in COLUMNS.values()) + " |" for name in found]
    titles = "| type | " + " | ".join(COLUMNS.values()) + " |"
    lines = [titles, "| --- |" + " --- |" * len(COLUMNS), *rows]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + TAIL)
    print(f"{PAGE.relative_to(ROOT)}: {len(rows)} types")


def results(report: Path) -> dict[str, dict[str, str]]:
    """Family -> column -> its largest error, "yes" or "fails"."""
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name") or "")
        if not match or match[1] not in COLUMNS or case.find("skipped") is not None:
            continue
        family = next(part for part in match[2].split("-") if part not in ("own", "frozen", "size0", "size1"))
        column = found.setdefault(family, {})
        errors = [float(one.get("value") or 0) for one in case.iter("property") if one.get("name") == "error"]
        if case.find("failure") is not None or case.find("error") is not None:
            column[COLUMNS[match[1]]] = "fails"
        elif column.get(COLUMNS[match[1]]) != "fails":
            before = column.get(COLUMNS[match[1]], "0")
            worst = max([*errors, float(before) if before != "yes" else 0.0], default=0.0)
            column[COLUMNS[match[1]]] = f"{worst:.0e}" if errors else "yes"
    return found


if __name__ == "__main__":
    main()
