"""The figures of videos in docs/benchmarks.md: memory, and which moments the maps find."""

from __future__ import annotations


def memory(found: dict) -> list[str]:
    by = {(row["frames"], row["call"]): row for row in found["rows"]}
    frames = sorted({row["frames"] for row in found["rows"]})

    def cell(row: dict) -> str:
        return "refused" if "refused" in row else f"{row['resident'] / 2**20:,.0f}"

    over = found["explain_over_generate"]["resident"]
    growth = found["growth"]["explain"]
    return [
        "A word about a video of 1,036 tokens a frame (a LLaVA of random weights, 4 layers of d = 256, CPU): the most"
        " memory that a call takes, MiB above what was there before it. `output_attentions` is transformers' eager"
        " attention, with the matrices that a caller would read; what asks for more than 8 GiB is refused:",
        "",
        "| frames | tokens | generated | explained, with the maps of all frames | `output_attentions` |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {n} | {by[n, 'explain']['tokens']:,} | {cell(by[n, 'generate'])} | {cell(by[n, 'explain'])} |"
            f" {cell(by[n, 'output_attentions'])} |"
            for n in frames
        ),
        "",
        f"Explaining takes {max(over.values()):.2f} times the memory of generating. From 8 to 16 frames the tensors of"
        f" an explanation grow {growth:.2f} times as much as from 4 to 8: linear in the tokens.",
    ]


def moments(found: dict) -> list[str]:
    figures, accuracy = found["figures"], found["accuracy"]

    def cell(value: float | None) -> str:
        return "—" if value is None else f"{100 * value:.1f}"

    maps, closed = figures["maps"], figures["knockout"]
    return [
        f"The embedded model for videos, over {figures['questions']} generated clips of 4 to 8 frames that it never"
        " saw, a question each. Highest in the interval: the largest value of the map of the answer's word lies in a"
        " frame that shows what is asked about (until or since a colour turns; from an appearance to the end of its"
        " half). What moves does so all the time. Percent:",
        "",
        "| question | right | highest in the interval | highest on the object |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {task} | {cell(one['right'])} | {cell(one['in_time'])} | {cell(one['on_object'])} |"
            for task, one in figures["tasks"].items()
        ),
        "",
        "| map | highest in the interval | share of the map there | highest on the object |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {method} | {cell(one['in_time'])} | {cell(one['mass_in_time'])} | {cell(one['on_object'])} |"
            for method, one in maps.items()
        ),
        "",
        f"Without the event's moments {cell(closed['event']['changed'])} % of the answers change and log p of the word"
        f" falls by {closed['event']['fall']:.1f}; without all other moments {cell(closed['others']['changed'])} %"
        f" change ({round(closed['others']['fall'], 1) + 0.0:.1f}), without as many others at random"
        f" {cell(closed['random']['changed'])} %.",
        "",
        "| image tokens kept a layer | one budget for all frames: right, % | one a frame: right, % |",
        "| ---: | ---: | ---: |",
        *(
            f"| {100 * one['keep']:g} % | {cell(one['right'])} | {cell(other['right'])} |"
            for one, other in zip(figures["contexts"][::2], figures["contexts"][1::2], strict=True)
        ),
        "",
        f"Accuracy over {accuracy['clips']:,} questions a task, right to the letter: "
        + ", ".join(f"{task} {value:.3f}" for task, value in accuracy["accuracy"].items())
        + ". Its training makes it read answers from the moment and the object that show them in part by construction"
        " (see `mllm_fast/shapes/train_clips.py`).",
    ]
