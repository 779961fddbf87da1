"""The command line, one file a command; `mllm-fast --help` lists them."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line: the entry point `mllm-fast`."""
    from ..core.errors import InputError
    from ..core.plugins import load_plugins

    try:
        load_plugins(_named(sys.argv[1:]))  # before the options are made, whose help lists what there is
    except InputError as error:
        print(f"mllm-fast: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    from .app import main as run

    run()


def _named(arguments: list[str]) -> list[str]:
    """The plugins that are named by `--plugin` before the command, or else by the environment."""
    found = []
    while arguments and arguments[0].startswith("--plugin"):
        word = arguments.pop(0)
        if "=" in word:
            found.append(word.partition("=")[2])
        elif arguments:
            found.append(arguments.pop(0))
    return found or os.environ.get("MLLM_FAST_PLUGINS", "").split()
