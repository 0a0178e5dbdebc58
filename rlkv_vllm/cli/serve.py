"""``rlkv serve``: flags go to vLLM's own parser, so this module declares none."""

import typer


def serve(context: typer.Context) -> None:
    """Serve a model with a split KV cache (OpenAI-compatible).

    Without MODEL: the embedded reasoner. Every flag of vLLM's server is accepted.
    """
    from rlkv_vllm.serving.serve import serve

    raise typer.Exit(serve(context.args))
