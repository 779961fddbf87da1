"""The command line `mllm-fast`. `mllm-fast --help` lists its commands."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Load the plugins and run the command line. This is the entry point `mllm-fast`."""
    from ..core.errors import InputError
    from ..core.plugins import load_plugins
    from ..core.threads import spin_briefly

    spin_briefly()
    try:
        # before the options are created, because their help lists the plugins' methods
        load_plugins(_named(sys.argv[1:]))
    except InputError as error:
        print(f"mllm-fast: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    from .app import main as run

    run()


def _named(arguments: list[str]) -> list[str]:
    """Return the plugins named by `--plugin` before the command, or else by the variable MLLM_FAST_PLUGINS."""
    found = []
    while arguments and arguments[0].startswith("-"):
        word = arguments.pop(0)
        if word.startswith("--plugin="):
            found.append(word.partition("=")[2])
        elif word == "--plugin" and arguments:
            found.append(arguments.pop(0))
    return found or os.environ.get("MLLM_FAST_PLUGINS", "").split()
