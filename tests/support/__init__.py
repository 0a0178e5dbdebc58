"""What tests share."""

from pathlib import Path

#: Of the repository.
ROOT = Path(__file__).parents[2]
