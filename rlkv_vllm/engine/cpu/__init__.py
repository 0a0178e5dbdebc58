"""The split cache on the CPU."""
