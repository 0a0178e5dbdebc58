"""Training of gates: attention with one gate per KV head."""
