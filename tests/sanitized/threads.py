"""Runs every C++ kernel on several threads, in each instruction set, with numpy alone: for `.ci/sanitize`, whose thread
sanitizer stops the process at the first data race. What four threads compute must be what one computes.

`python tests/sanitized/threads.py FOLDER`, of a package whose extension was built with -fsanitize=thread.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

THREADS = 4
DRAW = np.random.default_rng(0)


def extension(folder: str):
    (path,) = Path(folder, "mllm_fast", "kernels").glob("_cpu*.so")
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(*shape: int, bfloat16: bool = False) -> np.ndarray:
    """Normal numbers; bfloat16 as the upper halves of float32."""
    drawn = DRAW.standard_normal(shape).astype(np.float32)
    return (drawn.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else drawn


def at(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def steps(array: np.ndarray) -> tuple[int, ...]:
    return tuple(step // array.itemsize for step in array.strides)


def attention(module, isa: str, threads: int, given: dict) -> list[np.ndarray]:
    query, key, value, segments, table, start = (
        given[name] for name in ["query", "key", "value", "segments", "table", "start"]
    )
    (batch, heads, rows, width), (kv_heads, keys) = query.shape, key.shape[1:3]
    out = np.full((batch, rows, heads, width), 0, query.dtype)
    total = np.zeros((batch, heads, rows), np.float32)
    mass = np.zeros((batch, heads, keys), np.float32)
    module.attention(
        [at(query), at(key), at(value)], query.dtype == np.uint16, [steps(query), steps(key), steps(value)],
        [at(segments), at(table), at(start), at(given["sinks"])], segments.shape[1], [width**-0.5, given["softcap"]],
        [batch, heads, kv_heads, rows, keys, width, keys - rows],
        [at(out), at(total), at(mass) if given["mass"] else 0, 0], threads, isa,
    )  # fmt: skip
    return [out, total, mass]


def attention_cases():
    for bfloat16 in (False, True):
        for rows, keys, width, heads, kv_heads, batch in (
            (257, 257, 64, 6, 3, 2),  # prefill
            (130, 700, 128, 4, 4, 1),
            (1, 5000, 64, 8, 2, 1),  # a step of decoding, keys cut in pieces
            (3, 900, 40, 4, 4, 3),
        ):
            segments = np.repeat(DRAW.integers(0, 4, (batch, keys // 50 + 1)), 50, 1)[:, :keys].astype(np.uint8)
            table = np.zeros(32, np.uint32)
            table[[1, 2]] = 0b1001
            for mass in (False, True):
                yield {
                    "query": numbers(batch, heads, rows, width, bfloat16=bfloat16),
                    "key": numbers(batch, kv_heads, keys, width, bfloat16=bfloat16),
                    "value": numbers(batch, kv_heads, keys, width, bfloat16=bfloat16),
                    "segments": np.ascontiguousarray(segments), "table": table,
                    "start": DRAW.integers(0, 9, batch).astype(np.int32), "mass": mass,
                    "softcap": 2.0 * mass, "sinks": DRAW.standard_normal(heads).astype(np.float32),
                }  # fmt: skip


def increase(module, isa: str, threads: int, given: dict) -> list[np.ndarray]:
    operands, writes = given["operands"], given["writes"]
    groups, rows, depth = writes.shape
    vocab = len(operands[0])
    out = np.zeros((groups, rows), np.float32)
    module.increase(
        at(writes), [at(one) for one in operands], operands[0].dtype == np.uint16,
        [at(given["source"]), at(given["tokens"])], [at(given["scale"]), at(given["rescale"]), 0],
        [at(given["logs"]), at(given["lean"]), at(given["raw"])], given["cap"],
        [len(given["logs"]), groups, rows, vocab, depth], at(out), threads, isa,
    )  # fmt: skip
    return [out]


def increase_cases():
    for bfloat16 in (False, True):
        for own, cap in ((False, 0.0), (True, 30.0)):
            for groups, rows, vocab, depth, shared in ((6, 70, 1003, 64, False), (2, 33, 2050, 256, True)):
                raw = numbers(3, vocab)
                logs = raw - np.log(np.exp(raw).sum(1, keepdims=True))
                count = 1 if shared else groups
                yield {
                    "writes": numbers(groups, rows, depth),
                    "operands": [numbers(vocab, depth, bfloat16=bfloat16) for _ in range(count)],
                    "source": DRAW.integers(0, 3, groups), "tokens": DRAW.integers(0, vocab, 3),
                    "scale": np.full(3, 0.1, np.float32),
                    "rescale": numbers(groups, rows) if own else None, "lean": numbers(3, vocab) if own else None,
                    "logs": logs, "raw": raw if cap else None, "cap": cap,
                }  # fmt: skip


def linear(module, isa: str, threads: int, given: dict) -> list[np.ndarray]:
    x, weight, bias = given["x"], given["weight"], given["bias"]
    out = np.zeros((len(x), len(weight)), x.dtype)
    kinds = [x.dtype == np.uint16, weight.dtype == np.uint16]
    module.skinny_linear([at(x), at(weight), at(bias), at(out)], kinds, [len(x), len(weight), x.shape[1]], threads, isa)
    return [out]


def linear_cases():
    for rows_half, weight_half in ((False, False), (False, True), (True, True)):
        for rows in (1, 7, 33):
            yield {
                "x": numbers(rows, 600, bfloat16=rows_half), "weight": numbers(1500, 600, bfloat16=weight_half),
                "bias": numbers(1500, bfloat16=weight_half),
            }  # fmt: skip


def weighted(module, isa: str, threads: int, given: dict) -> list[np.ndarray]:
    query, keys, values = given["query"], given["keys"], given["values"]
    (layers, heads, width), (kv_heads, count) = query.shape, keys[0].shape[:2]
    wanted = [(layer, head) for layer in range(layers) for head in range(heads)]
    out = np.zeros((len(wanted), count, width), np.float32)
    described = [
        ([at(k), at(v), at(given["seen"])], [*steps(k)[:2], *steps(v)[:2]], heads // kv_heads, width**-0.5)
        for k, v in zip(keys, values, strict=True)
    ]
    module.weighted_values(
        at(query), described, [(layer, layer * heads + head, head) for layer, head in wanted],
        query.dtype == np.uint16, [count, width], at(out), threads, isa,
    )  # fmt: skip
    return [out]


def weighted_cases():
    for bfloat16 in (False, True):
        yield {
            "query": numbers(3, 8, 64, bfloat16=bfloat16),
            "keys": [numbers(4, 900, 64, bfloat16=bfloat16) for _ in range(3)],
            "values": [numbers(4, 900, 64, bfloat16=bfloat16) for _ in range(3)],
            "seen": (DRAW.random(900) < 0.8).astype(np.uint8),
        }


def decoder(module, isa: str, threads: int, given: dict) -> list[np.ndarray]:
    (hidden, heads, _, width, _), layers = given["sizes"], given["layers"]
    made = module.Decoder(
        given["sizes"], (given["gelu"], given["bfloat16"]),
        [
            ([(at(norm), 1e-5) for norm in norms], [(at(one), 0) for one in linear], width**-0.5)
            for norms, linear in layers
        ],
        (at(given["final"]), 1e-5),
    )  # fmt: skip
    x, rows, count = given["x"].copy(), len(given["x"]), len(layers)
    store = [[one.copy() for one in pair] for pair in given["store"]]
    normed, kept = np.zeros_like(x), [rows - 1, 0]
    residual = np.zeros((2, count, hidden), np.float32)
    queries, outputs = (np.zeros((2, count, heads, width), np.float32) for _ in range(2))
    addresses = [(at(keys), at(values)) for keys, values in store]
    own = addresses, steps(store[0][0])[:3], store[0][0].shape[::2]
    first = given["prefix"][0][0]
    shared = [(at(keys), at(values)) for keys, values in given["prefix"]], steps(first)[:3], first.shape[::2]
    mask, recorded = [(at(given["segments"]), rows, 0, at(given["table"]))] * count, np.array(kept)
    last, needed = np.zeros((2, hidden), np.float32), recorded if given["few"] else None
    made.run(
        [rows, width, -1 if needed is None else len(needed)],
        [at(x), at(given["cos"]), at(given["sin"]), at(normed), 0 if needed is None else at(needed), at(last)], own,
        at(given["places"]),
        [(own, at(given["own"]), rows, mask), (shared, at(given["behind"]), rows, [])],
        len(kept), [at(one) for one in (recorded, residual, queries, outputs)], threads, isa,
    )  # fmt: skip
    return [x, last, normed, residual, queries, outputs, *(one for pair in store for one in pair)]


def decoder_cases():
    for case in float_decoder_cases():
        yield case | {"bfloat16": False, "few": False}
        yield case | {"bfloat16": False, "few": True}  # the last layer for two rows alone
        half = lambda arrays: [narrowed(one) for one in arrays]  # noqa: E731
        yield case | {
            "bfloat16": True,
            "few": True,
            "layers": [(norms, half(linear)) for norms, linear in case["layers"]],
            "store": [half(pair) for pair in case["store"]],
            "prefix": [half(pair) for pair in case["prefix"]],
        }


def narrowed(array: np.ndarray) -> np.ndarray:
    """Floats as bfloat16, cut off."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def float_decoder_cases():
    for rows, heads, kv_heads, width, head_norms in ((33, 8, 2, 32, True), (7, 4, 4, 64, False)):
        hidden, inner = 256, 512
        sizes = (heads * width, hidden), (kv_heads * width, hidden), (kv_heads * width, hidden)
        sizes = *sizes, (hidden, heads * width), (inner, hidden), (inner, hidden), (hidden, inner)
        each = np.ones(width, np.float32) if head_norms else None
        gain, angle = np.ones(hidden, np.float32), numbers(rows, width // 2)
        index = np.arange(rows)
        table = np.zeros(32, np.uint32)
        table[1] = 0b10
        yield {
            "sizes": (hidden, heads, kv_heads, width, inner), "gelu": head_norms, "final": gain,
            "layers": [([gain, each, each, gain], [numbers(*size) / 16 for size in sizes]) for _ in range(3)],
            "x": numbers(rows, hidden), "cos": np.cos(np.tile(angle, 2)), "sin": np.sin(np.tile(angle, 2)),
            "store": [[np.zeros((2, kv_heads, rows, width), np.float32) for _ in range(2)] for _ in range(3)],
            "prefix": [[numbers(1, kv_heads, 300, width) for _ in range(2)] for _ in range(3)],
            "places": np.stack([index * 2 // rows, index], 1),
            "own": np.stack([index, index * 2 // rows, index * 0, index + 1, index], 1),
            "behind": np.stack([index, index * 0, index * 0, index * 0 + 300, index * 0], 1),
            "segments": DRAW.integers(0, 2, (1, rows)).astype(np.uint8), "table": table,
        }  # fmt: skip


KERNELS = {
    "decoder_layers": (decoder, decoder_cases),
    "attention": (attention, attention_cases),
    "increase": (increase, increase_cases),
    "skinny_linear": (linear, linear_cases),
    "weighted_values": (weighted, weighted_cases),
}


def widened(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def main() -> None:
    module = extension(sys.argv[1])
    for name, (run, cases) in KERNELS.items():
        for isa in module.instruction_sets():
            count = 0
            for given in cases():
                for got, alone in zip(*(run(module, isa, n, given) for n in (THREADS, 1)), strict=True):
                    # tasks are cut by the threads, so weights of bfloat16 are rounded at other peaks: by 2^-9 each
                    atol = 2**-9 if got.dtype == np.uint16 else 1e-3
                    np.testing.assert_allclose(
                        widened(got), widened(alone), rtol=1e-2, atol=atol, err_msg=f"{name} {isa}"
                    )
                count += 1
            print(f"{name:16} {isa:12} {count} cases on {THREADS} threads as on one", flush=True)


if __name__ == "__main__":
    main()
