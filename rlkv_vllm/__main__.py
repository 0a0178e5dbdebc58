"""``python -m rlkv_vllm``: the ``rlkv`` command without its console script."""

from rlkv_vllm.cli import main
from rlkv_vllm.serving import progress

if __name__ == "__main__":
    # As in a script, or multiprocessing would not run this file in the engine's processes.
    __spec__ = None
    main()
elif progress.is_quiet():  # the engine's processes: before they import vLLM, which logs
    progress.quiet_logging([])
