"""``python -m rlkv_vllm``: the ``rlkv`` command without its console script."""

from rlkv_vllm.cli import main

if __name__ == "__main__":  # the engine's processes import this module again
    main()
