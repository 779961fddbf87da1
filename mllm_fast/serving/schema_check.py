"""A check of JSON schemas from clients, in a process of its own with little memory and time.

Some schemas of a few hundred characters (many patterns in one `allOf`) take exponential time and memory to read. The
process is this file, run as a script, so that it imports nothing but llguidance.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

_MEMORY, _CPU_SECONDS = 256 << 20, 2  # a schema of 50,000 characters takes 30 MiB and 20 ms
_SECONDS = 20.0  # beside others, with the start of Python


def schema_error(schema: str, defaults: dict[str, Any]) -> str:
    """Return why llguidance cannot follow a JSON schema; "" if it can.

    Args:
        schema: The schema, as JSON.
        defaults: Options of llguidance's grammars.

    Raises:
        TimeoutError: The machine was too busy for the check.
        RuntimeError: The check could not run.
    """
    given = json.dumps({"schema": schema, "defaults": defaults})
    try:
        done = subprocess.run(
            [sys.executable, __file__], input=given, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"a schema was not checked within {_SECONDS:g} s") from None
    if done.returncode < 0:  # the kernel ended it at a limit, or it ended itself without memory
        return "it takes too much time or memory to read; make it simpler"
    if done.returncode:
        raise RuntimeError(f"the check of schemas does not run: {done.stderr.strip()[-200:]}")
    return done.stdout.strip()


def _check() -> None:
    from llguidance import LLMatcher

    given = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # no other kernel keeps to this limit; the processor's time bounds the memory there
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    try:
        grammar = LLMatcher.grammar_from_json_schema(given["schema"], defaults=given["defaults"])
        error = LLMatcher.validate_grammar(grammar)
    except (ValueError, RuntimeError) as problem:
        error = str(problem)
    except MemoryError:
        os.abort()
    if error:
        sys.stdout.write(error.splitlines()[0])


if __name__ == "__main__":
    _check()
