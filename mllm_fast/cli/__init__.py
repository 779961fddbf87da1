"""The command line, one file a command; `mllm-fast --help` lists them."""

from __future__ import annotations


def main() -> None:
    """Run the command line: the entry point `mllm-fast`."""
    from .app import main as run

    run()
