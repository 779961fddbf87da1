"""A whole model's section of gpu.py: tokens of a LLaVA as large as LLaVA-1.5-7B, with knockouts and explained."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from gpu_measure import Bench
from harness import median
from models import random_llava

import mllm_fast as mf
from mllm_fast.shapes.scenes import generate_scene

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import knocked

TOKENS, ROUNDS = 32, 5
SIZES = {"hidden": 4096, "layers": 32, "heads": 32, "intermediate": 11_008, "grid": (24, 24), "vocab": 32_064}
TINY = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 32, "grid": (4, 4), "vocab": None}
QUESTION = "describe the image."


class Tokens:
    """32 tokens from a picture: transformers' own with SDPA, with the image knocked out, streamed, streamed and
    explained (all heads, the ten best heads' positions, the map)."""

    title = "a model of LLaVA-1.5-7B's sizes, random weights, bf16: a token, eager, the host's time counted"

    def gate(self, bench: Bench) -> None:
        """Two layers of it in float32: knocked out, the tokens are those of eager attention with the additive mask."""
        vlm, rules = self._model(bench, torch.float32, layers=2), self._rules(2)
        ours = self._knocked_out(vlm, rules)
        with knocked.eager(vlm, rules, [ours.layout]):
            expected = vlm.generate(self.picture, QUESTION, max_new_tokens=TOKENS)
        if ours.token_ids != expected.token_ids or not ours.token_ids:
            raise SystemExit(f"model: {ours.token_ids}, eager {expected.token_ids}: no figures for a wrong answer")

    @property
    def picture(self):
        return generate_scene(np.random.default_rng(0)).image

    def _model(self, bench: Bench, dtype: torch.dtype, **sizes: object) -> mf.VLM:
        made = random_llava(**((TINY if bench.rehearsal else SIZES) | {"window": 2048} | sizes), device=bench.device)  # type: ignore[arg-type]
        return mf.VLM(made.model.to(dtype), made.processor, backend=bench.backend)

    def _rules(self, layers: int) -> list[knocked.Rule]:
        return [knocked.Rule("image", target, "all", tuple(range(layers))) for target in ("query", "generated")]

    def _knocked_out(self, vlm: mf.VLM, rules: list[knocked.Rule]) -> mf.Answer:
        return vlm.generate(self.picture, QUESTION, knockout=knocked.knockouts(rules), max_new_tokens=TOKENS)

    def measure(self, bench: Bench) -> list[dict]:
        vlm, picture = self._model(bench, bench.dtype), self.picture
        rules = self._rules(len(vlm.text.layers))

        def stream(explain: bool, static: bool = False) -> mf.Answer:
            steps = vlm.stream(picture, QUESTION, explain=explain, static=static, max_new_tokens=TOKENS)
            for step in steps:
                if explain:
                    step.heatmap()
            return steps.answer

        runs = {
            "generate, SDPA": lambda: vlm.generate(picture, QUESTION, max_new_tokens=TOKENS),
            "generate, image knocked out": lambda: self._knocked_out(vlm, rules),
            "stream": lambda: stream(False),
            "stream, explained": lambda: stream(True),
            "static stream": lambda: stream(False, static=True),
            "static stream, explained": lambda: stream(True, static=True),
        }
        ms: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(1 if bench.rehearsal else ROUNDS + 1):
            for name, run in runs.items():
                bench.synchronize()
                start = time.perf_counter()
                said = run()
                bench.synchronize()
                if i:  # the first compiles
                    ms[name].append((time.perf_counter() - start) / len(said.token_ids) * 1e3)
        rows: list[dict] = [{"contender": name, "at_most": TOKENS} for name in runs]
        for row in rows:
            if ms[row["contender"]]:
                row["ms_a_token"] = median(ms[row["contender"]])
                print(f"  {row['contender']:30s} {row['ms_a_token']:7.2f} ms a token, the picture's pass included")
        return rows
