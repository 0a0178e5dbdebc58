"""What the processes of a test run share."""

from __future__ import annotations

import tempfile
from pathlib import Path

from filelock import FileLock


def ranks_lock() -> FileLock:
    """Held while an engine of several ranks runs: they wait in busy loops, one to a core."""
    return FileLock(Path(tempfile.gettempdir()) / "rlkv-vllm-tests-ranks.lock")
