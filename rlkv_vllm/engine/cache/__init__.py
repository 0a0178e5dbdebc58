"""The split cache inside vLLM: specs, block managers, cache layers, scheduler."""
