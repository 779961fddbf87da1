"""What the library logs, on stderr, for the option -v."""

from __future__ import annotations

import logging

from rich.logging import RichHandler

from .options import ERR


def show_log(verbose: int) -> None:
    """Show the library's own log on stderr, or no longer.

    Args:
        verbose: How often -v was given: 0 shows nothing, 1 what happens, 2 details as well.
    """
    logger = logging.getLogger("mllm_fast")
    for shown in [one for one in logger.handlers if isinstance(one, RichHandler)]:  # of an earlier call of `main`
        logger.removeHandler(shown)
        logger.setLevel(logging.NOTSET)
    if verbose:
        logger.addHandler(RichHandler(console=ERR, show_path=False, omit_repeated_times=False, log_time_format="%X"))
        logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
