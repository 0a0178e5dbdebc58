"""The split cache on CUDA."""
