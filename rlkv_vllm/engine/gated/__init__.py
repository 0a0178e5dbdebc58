"""Gated mode: full caches and a gate per KV head."""
