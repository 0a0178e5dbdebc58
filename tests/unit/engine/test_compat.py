"""What `engine/compat.py` does to the end of an engine's processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import atexit, gc, multiprocessing, os

def late():  # after what is registered later
    os.write(1, b"frozen" if gc.get_freeze_count() else b"to be collected")
    os.write(2, b"leaked instance")

def child():
    from rlkv_vllm.engine.compat import exit_without_collecting
    atexit.register(late)
    exit_without_collecting()
    os.write(2, b"a message")

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
"""


def test_an_engine_ends_without_a_collection_and_the_noise_of_libraries(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "frozen"
    assert done.stderr == "a message"
