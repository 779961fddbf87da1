"""Contexts behind an HTTP interface: `mllm-fast serve`, a tool in the browser, a Ray Serve application."""
