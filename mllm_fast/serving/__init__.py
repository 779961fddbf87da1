"""The HTTP server `mllm-fast serve`, the browser tool, and the Ray Serve application."""
