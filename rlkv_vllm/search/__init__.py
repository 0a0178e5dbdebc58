"""Search for the full heads that serve best: `rlkv refine`."""
