"""Search for full heads that serve better, around those of a profile: `rlkv refine`."""
