"""docs/papers.md: every command of a row runs as it stands there, on generated scenes with the embedded model.

The figures that the commands print are compared with numbers by hand in the tests of each evaluation.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "papers.md").read_text()
COMMANDS = sorted(
    {
        command
        for line in PAGE.splitlines()
        if line.startswith("| ")
        for command in re.findall(r"`(mllm-fast [^`]+)`", line)
        if not re.search(r"\b(FILE|FOLDER|NAME)\b", command)
    }
    - {"mllm-fast compress", "mllm-fast explain --method gradient-alignment"}  # test_cli_context, test_joint_embedded
)
SMALL = {"eval": "2", "joint": "2", "detect": "2"}  # images


def test_every_evaluation_has_a_row():
    from mllm_fast.cli.joint import joint
    from mllm_fast.evaluation.registry import EVALUATIONS

    rows = "\n".join(line for line in PAGE.splitlines() if line.startswith("| "))
    for name in EVALUATIONS.names():
        assert name == "fidelity" or f"mllm-fast eval {name}" in rows, name
    commands = [one.name or one.callback.__name__ for one in joint.registered_commands]
    for name in commands:
        assert name == "finetune" or f"joint {name}" in rows, name


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run(command, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    many = words[0] in ("eval", "joint") or "--report" in words
    if many:
        words += ["--count", SMALL[words[0]], "--out", str(tmp_path / "out")]
        code, out, err = run(*words, "--json")
        assert code == 0, err
        figures = json.loads(out)
        assert figures
        assert all("failed" not in one or not one["failed"] for one in figures.values() if isinstance(one, dict))
        return
    code, out, err = run(*words)
    assert code == 0, err
    assert out.strip()
