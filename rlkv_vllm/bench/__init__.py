"""``rlkv bench``: the split cache beside stock vLLM, in one run and at equal conditions."""
