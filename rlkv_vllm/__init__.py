"""Serve reasoning models from stock vLLM with a per-head split KV cache."""

__version__ = "0.1.0"
