"""Settings of all tests."""

from hypothesis import settings

# The same examples every time: a red build must be red again on the next run.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
