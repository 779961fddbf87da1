"""What the library logs, on stderr, for the option -v."""

from __future__ import annotations

import logging

from .options import ERR


def show_log(verbose: int) -> None:
    """Show the library's own log on stderr.

    Args:
        verbose: How often -v was given: 0 leaves logging as it is, 1 shows what happens, 2 shows details as well.
    """
    logger = logging.getLogger("mllm_fast")
    if not verbose:
        return
    from rich.logging import RichHandler

    logger.addHandler(RichHandler(console=ERR, show_path=verbose > 1, omit_repeated_times=False, log_time_format="%X"))
    logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
