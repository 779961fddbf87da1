"""The papers' figures as commands, on any model and on your own pictures; see `mllm-fast eval`."""
