"""`python -m mllm_fast` is the command line."""

from .cli import main

main()
