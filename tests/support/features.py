"""Every feature of vLLM that a user may turn on, and what it does to a split cache.

The only place where this is said: ``docs/features.md`` is made from it (``make docs``), and a test
holds each row against the tests and refusals that it names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class State(StrEnum):
    """What a user can rely on."""

    WORKS = "works"
    REFUSED = "refused"
    #: Let through, and nothing known about it.
    UNMEASURED = "not measured"


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        name: the feature and its flag.
        state: ``WORKS`` only if a test shows it, ``REFUSED`` only if starting with it fails.
        meaning: what a user gets.
        tests: pytest node ids, without parameters, that show it.
        refusal: what refuses it: ``Refusal.what`` or a layer's property in ``support.py``, or a
            key of ``SERVER_REFUSALS`` in ``preflight.py``; empty where vLLM itself does.
    """

    name: str
    state: State
    meaning: str
    tests: tuple[str, ...] = ()
    refusal: str = ""


_SERVING = "tests/integration/test_serving_features.py"
_PREFIX = f"{_SERVING}::TestPrefixCaching"
_SAMPLING = "tests/integration/test_sampling.py"
_PARITY = "tests/integration/test_parity.py"
_REFUSALS = "tests/integration/test_refusals.py"
_TP = "tests/integration/test_tensor_parallel.py"
_WEIGHTS = "tests/integration/test_weights.py"
_RING = "tests/unit/engine/test_ring_manager.py"
_MACHINE = "tests/unit/engine/test_ring_machine.py::test_no_sequence_of_events_breaks_the_rings"
_FLAG = (f"{_REFUSALS}::test_unsupported_flags",)
_MODE = (f"{_REFUSALS}::test_unsupported_models_and_modes",)
_LAYER = (f"{_REFUSALS}::test_unsupported_layers",)


_CHOICE = "tests/integration/test_cuda_parts.py::TestChoiceOfBackend"
_CUDA_ONLY = (f"{_CHOICE}::test_what_only_the_cpu_has_shown_is_refused",)


def _works(name: str, meaning: str, *tests: str) -> Feature:
    return Feature(name, State.WORKS, meaning, tests)


def _refused(name: str, refusal: str, tests: tuple[str, ...], meaning: str = "") -> Feature:
    return Feature(name, State.REFUSED, meaning, tests, refusal)


def _unmeasured(name: str, meaning: str, *tests: str) -> Feature:
    return Feature(name, State.UNMEASURED, meaning, tests)


#: Rows by section, in the order of the page.
FEATURES: dict[str, tuple[Feature, ...]] = {
    "Prefix caching": (
        _works(
            "the same prompt again",
            "all of its full blocks but that of the last token are hit",
            f"{_PREFIX}::test_identical_prompt",
        ),
        _works(
            "another prompt with the same beginning",
            "hits at the last multiple of the retention interval, 256 tokens",
            f"{_PREFIX}::test_different_prompt_with_a_shared_prefix",
        ),
        _works(
            "several turns",
            "the next turn hits all of the last one, the answer included",
            f"{_PREFIX}::test_multi_turn",
        ),
        _works(
            "`--prefix-cache-retention-interval`",
            "wins over `retention_interval` of the split's own options",
            f"{_REFUSALS}::test_vllms_retention_interval_wins",
            f"{_RING}::test_a_different_prompt_hits_the_shared_prefix",
        ),
        _works(
            "`cache_salt`",
            "requests with different salts share nothing",
            f"{_SAMPLING}::test_cache_salt_separates_tenants",
        ),
        _works(
            "eviction and re-fill",
            "a prompt that was pushed out is computed anew and hit again",
            f"{_SAMPLING}::test_eviction_and_refill",
        ),
        _works(
            "blocks filled and hit in one step",
            "requests that arrive together share a beginning",
            f"{_PREFIX}::test_blocks_filled_and_hit_in_one_step",
        ),
        _works(
            "reset of the prefix cache",
            "with and without running requests",
            f"{_SAMPLING}::test_reset_of_the_prefix_cache",
            f"{_SAMPLING}::test_reset_of_the_prefix_cache_while_requests_run",
        ),
        _works(
            "`--kv-events-config`",
            "events by KV cache group: group 0 is the full heads', the others look like sliding "
            "windows; a reader that routes by prefix takes group 0",
            f"{_SAMPLING}::test_kv_events_tell_what_is_cached",
        ),
    ),
    "Scheduling": (
        _works(
            "chunked prefill",
            "a request's peak is its steady state, whatever the chunk",
            f"{_SERVING}::test_chunked_prefill",
            f"{_RING}::test_no_block_leaks_under_chunked_prefill",
        ),
        _works(
            "preemption and recomputation",
            "in a pool too small for the running requests",
            f"{_SERVING}::test_preemption_in_a_small_pool",
        ),
        _works(
            "aborts",
            "of waiting, prefilling, decoding and preempted requests; all blocks come back",
            f"{_SERVING}::test_aborts_in_flight_give_all_blocks_back",
        ),
        _works(
            "asynchronous scheduling, on and off",
            "two steps in flight, as many and as full as with stock vLLM, which has it on for CUDA "
            "and off for the CPU",
            f"{_SERVING}::test_two_steps_in_flight",
            f"{_SERVING}::test_asynchronous_steps_are_those_of_stock_vllm",
            f"{_RING}::test_admission_covers_the_peak",
        ),
        _works(
            "any sequence of the above",
            "random events on vLLM's scheduler against a model of every cache slot",
            _MACHINE,
        ),
        _works(
            "`--scheduling-policy priority`",
            "the least urgent request is preempted",
            f"{_SERVING}::test_preemption_in_a_small_pool",
        ),
        _refused(
            "head dimensions other than 32, 64, 96, 128, 256 on a GPU",
            "head dimensions other than 32, 64, 96, 128, 256 on a GPU",
            (f"{_CHOICE}::test_the_configuration_is_refused_before_weights_load",),
        ),
        _refused(
            "`--enable-dbo`, `--ubatch-size`", "--enable-dbo, --ubatch-size (micro-batches)", _MODE
        ),
        _refused("`--kv-sharing-fast-prefill`", "--kv-sharing-fast-prefill", _FLAG),
        _refused(
            "`--disable-hybrid-kv-cache-manager`",
            "--disable-hybrid-kv-cache-manager (rings would be given full caches)",
            _FLAG,
        ),
        _refused(
            "`--max-model-len auto`",
            "--max-model-len auto (the packing of the heads depends on it)",
            _MODE,
        ),
    ),
    "Execution": (
        _works("eager", "`--enforce-eager`", f"{_PARITY}::test_equals_the_oracle"),
        _works(
            "torch.compile",
            "traced as always; tested without inductor's code generation",
            f"{_PARITY}::test_compiled_model_equals_the_oracle",
        ),
        _works(
            "`--dtype float32`, `bfloat16`, `float16`",
            "the half ones within their rounding",
            f"{_PARITY}::test_equals_the_oracle",
            f"{_PARITY}::test_half_precision_is_the_oracle_within_rounding",
        ),
        _works(
            "`--block-size`",
            "multiples of 16; others are refused",
            f"{_PARITY}::test_equals_the_oracle",
            f"{_REFUSALS}::test_unsupported_flags",
        ),
        _works(
            "no profile, or one with full heads only",
            "stock vLLM's tokens and log-probabilities, bit for bit",
            f"{_PARITY}::test_all_full_profile_and_idle_plugin_equal_stock_vllm",
        ),
        _unmeasured(
            "CUDA, CUDA graphs",
            "the backend is exact under Triton's interpreter; it has not served on a GPU yet",
            "tests/integration/test_cuda_backend.py::"
            "test_split_equals_the_oracle_under_all_that_the_scheduler_does",
        ),
        _refused(
            "platforms other than CPU and NVIDIA GPUs of compute capability 8.0 or more",
            "this platform (neither a CPU nor an NVIDIA GPU of compute capability 8.0 or more)",
            ("tests/integration/test_refusals.py::test_unsupported_platforms",),
        ),
        _refused(
            "`--attention-backend`",
            "--attention-backend other than CUSTOM, or one per kind",
            (f"{_CHOICE}::test_another_backend_is_refused",),
            "the split cache brings its own",
        ),
        _refused(
            "`--enable-sleep-mode` on the CPU",
            "",
            (f"{_REFUSALS}::test_sleep_mode_is_vllms_to_refuse",),
            "vLLM has none there",
        ),
        _refused(
            "`--enable-sleep-mode` on CUDA",
            "--enable-sleep-mode",
            _CUDA_ONLY,
            "not shown yet: the views of the heads on the pool would have to survive its sleep",
        ),
        _works(
            "`vllm bench serve`",
            "from Python on the CPU: the console script of its wheel does not start",
            "tests/e2e/test_clients.py::test_vllms_own_benchmark",
        ),
        _refused(
            "vLLM's V2 model runner on the CPU",
            "VLLM_USE_V2_MODEL_RUNNER on the CPU",
            _MODE,
            "not shown; vLLM takes it by itself where triton-cpu is installed",
        ),
    ),
    "Parallelism": (
        _works(
            "`--tensor-parallel-size 2`",
            "every rank gets the same number of full heads, give or take one; also a rank "
            "without full heads; it changes which heads stream, so `--max-loss` needs evaluation "
            "rows of as many ranks",
            f"{_TP}::test_ranks_equal_the_oracle",
            f"{_REFUSALS}::test_a_budget_takes_rows_of_what_is_served",
        ),
        _works(
            "`--tensor-parallel-size` 4",
            "three of four ranks without full heads; run by hand with `RLKV_TEST_TP4=1`, not in "
            "CI: vLLM's CPU ranks wait for each other in busy loops. Passed 2026-11-25",
            f"{_TP}::test_ranks_equal_the_oracle",
        ),
        _refused(
            "`--pipeline-parallel-size`",
            "--pipeline-parallel-size > 1",
            _FLAG,
            "every stage would register the padding of all; stock vLLM 0.32's own pipeline "
            "fails on the CPU in eager mode",
        ),
        _refused(
            "`--data-parallel-size`",
            "--data-parallel-size > 1",
            _MODE,
            "status, forecast and metrics are those of one engine: one server per replica instead",
        ),
        _refused(
            "context parallelism",
            "--decode-context-parallel-size / --prefill-context-parallel-size > 1",
            _MODE,
        ),
        _refused(
            "`--distributed-executor-backend ray`",
            "--distributed-executor-backend ray",
            _MODE,
            "not shown: on the CPU stock vLLM 0.32 ends with `current platform cpu does not "
            "support ray`",
        ),
    ),
    "Requests": (
        _works(
            "`n`",
            "completions share the prompt's blocks",
            f"{_SAMPLING}::test_several_completions_of_one_prompt",
        ),
        _works(
            "`seed`",
            "also with a chunked prefill on the CPU, where stock vLLM 0.32 ends with `CPU "
            "Generator does not use offset`: `rlkv serve` and `split()` bring a worker that does "
            "not",
            f"{_SAMPLING}::test_a_seed_repeats_its_answer",
            f"{_SERVING}::test_a_seed_survives_a_chunked_prompt",
        ),
        _works(
            "`logprobs`, `prompt_logprobs`",
            "the oracle's within 1e-4, also for a prompt that is in the prefix cache",
            f"{_SAMPLING}::test_logprobs_of_answer_and_prompt",
        ),
        _works("`min_tokens`, `max_tokens`", "", f"{_SAMPLING}::test_shortest_and_longest_answers"),
        _works("`stop`, `stop_token_ids`", "", f"{_SAMPLING}::test_stop_strings_and_tokens"),
        _works("beam search", "", f"{_SAMPLING}::test_beam_search_is_that_over_the_oracle"),
        _works(
            "structured output",
            "regular expression, choice, JSON schema",
            f"{_SAMPLING}::test_structured_output",
        ),
        _works(
            "`--reasoning-parser`",
            "the chain of thought apart from the answer, streamed too",
            "tests/e2e/test_server.py::test_right_answers_with_the_reasoning_separated",
            "tests/e2e/test_server.py::test_streaming_says_the_same_in_order",
        ),
        _works(
            "`--enable-prompt-embeds`",
            "embeddings of tokens are answered, and cached, as the tokens are",
            f"{_SAMPLING}::test_prompt_embeddings",
        ),
    ),
    "Models": (
        _works(
            "Llama, Mistral, Qwen2, Qwen3",
            "their architectures with random weights, and the embedded reasoner",
            f"{_PARITY}::test_equals_the_oracle",
        ),
        _works(
            "other decoders whose layers are plain attention, all alike",
            "shown with Granite, ERNIE 4.5 and, through vLLM's Transformers backend, Seed-OSS; a "
            "layer that is not plain is refused when the model is built",
            f"{_PARITY}::test_equals_the_oracle",
            f"{_PARITY}::test_a_model_that_vllm_runs_through_transformers",
            f"{_REFUSALS}::test_layers_unlike_the_others",
        ),
        _refused(
            "LoRA (`--enable-lora`)",
            "--enable-lora",
            _FLAG,
            "on the CPU stock vLLM 0.32 gives requests without an adapter the answers of the last "
            "one when both are in a batch; not shown on a GPU",
        ),
        _works(
            "quantised weights (`--quantization`)",
            "shown with compressed-tensors W8A8, within its rounding; the split sees keys and "
            "values after the projections, whatever the scheme",
            f"{_WEIGHTS}::test_weights_of_8_bits_are_the_oracle_within_rounding",
        ),
        _works(
            "speculative decoding with n-grams (`--speculative-config`)",
            "on the CPU; drafts shorter than the window",
            f"{_SAMPLING}::test_rejected_drafts_do_not_disturb_a_ring",
            f"{_REFUSALS}::test_unsupported_flags",
        ),
        _refused(
            "speculative decoding with a draft model, EAGLE, MTP and others",
            "--speculative-config with another method than ngram (drafters with a cache of their "
            "own)",
            (
                f"{_REFUSALS}::test_drafters_with_a_cache_of_their_own",
                f"{_REFUSALS}::test_unsupported_flags",
            ),
            "the drafter's layers would need pages of another size in the pool of the heads",
        ),
        _refused(
            "speculative decoding on a GPU",
            "--speculative-config on a GPU",
            _CUDA_ONLY,
            "shown to be exact on the CPU only",
        ),
        _works(
            "8-bit KV cache (`--kv-cache-dtype fp8`, `fp8_e4m3`, `fp8_e5m2`)",
            "on the CPU (AVX-512): a block is half of bfloat16's; vLLM's "
            "kernel cuts keys and values of full heads off, ours rounds those of streaming heads; "
            "blocks of a multiple of 32 tokens; `--max-loss` needs rows of this type; "
            "[accuracy](../reports/2026-11-24-embedded-evaluation.md#an-8-bit-kv-cache)",
            f"{_PARITY}::test_a_cache_of_8_bits_is_the_oracle_with_rounded_keys",
            "tests/unit/kernels/test_streaming.py::test_a_cache_of_8_bits_holds_rounded_keys",
            f"{_REFUSALS}::test_a_budget_takes_rows_of_what_is_served",
        ),
        _refused(
            "other quantised KV caches",
            "--kv-cache-dtype other than the model's own and fp8, fp8_e4m3, fp8_e5m2",
            _FLAG,
        ),
        _refused(
            "8-bit KV cache on a GPU",
            "--kv-cache-dtype fp8 on a GPU",
            _CUDA_ONLY,
            "the Triton kernels read no 8-bit caches",
        ),
        _refused(
            "8-bit KV cache on a CPU that vLLM's kernel does not take",
            "--kv-cache-dtype fp8 on a CPU without AVX-512, or with head dimensions that are no "
            "multiple of 32",
            (f"{_REFUSALS}::test_a_cpu_without_a_cache_of_8_bits",),
        ),
        _refused(
            "KV connectors and offloading (`--kv-transfer-config`, `--kv-offloading-size`)",
            "--kv-transfer-config (KV connectors and offloading)",
            (
                f"{_REFUSALS}::test_unsupported_flags",
                f"{_REFUSALS}::test_unsupported_models_and_modes",
            ),
        ),
        _refused(
            "models with sliding-window layers (Gemma 3 style)",
            "models with their own sliding-window layers",
            _MODE,
            "their layers would need pages of another size in the pool of the heads",
        ),
        _refused("multi-head latent attention", "multi-head latent attention (MLA) models", _MODE),
        _refused("encoder-decoder models", "encoder-decoder models", _MODE),
        _refused(
            "multimodal models, prefix attention over images among them",
            "multimodal models",
            _MODE,
        ),
        _refused(
            "hybrid models (state-space layers)",
            "models with state-space layers or without attention",
            _MODE,
        ),
        _refused(
            "diffusion language models",
            "diffusion language models",
            _MODE,
            "they need a scheduler of their own and see later tokens",
        ),
        _refused("pooling models", "pooling models (embeddings, scoring)", _MODE),
        _refused("ALiBi", "ALiBi slopes", _LAYER),
        _refused("logits soft-cap", "a logits soft-cap", _LAYER),
        _refused("attention-sink weights", "learned attention sinks", _LAYER),
        _refused("a sliding window in a layer", "a sliding window of its own", _LAYER),
        _refused("layers that share a cache", "a KV cache shared with another layer", _LAYER),
        _refused(
            "layers of different shapes or masks",
            "",
            (f"{_REFUSALS}::test_layers_unlike_the_others",),
            "by `check_layer_shape`, when the model is built",
        ),
    ),
}

_HEAD = """\
# Features of vLLM

Which vLLM features work with a split cache.

- **works**: the named test compares tokens or log-probabilities with the oracle (a plain forward
  pass with the same mask per head), or counts blocks.
- **refused**: the engine or `rlkv serve` does not start. The error says why and what to do instead.
- not measured: no test shows that it works, and nothing refuses it. Do not rely on it.

`make docs` writes this page from `tests/support/features.py`. A test fails when a row names a test
or a refusal that does not exist.

All tests run on the CPU.
"""


def page() -> str:
    """``docs/features.md``."""
    return _HEAD + "".join(_section(name, rows) for name, rows in FEATURES.items())


def _section(name: str, rows: tuple[Feature, ...]) -> str:
    lines = [
        f"\n## {name}\n",
        "| feature | state | what it means | shown by |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Feature) -> Iterator[str]:
    yield row.name
    yield str(row.state) if row.state is State.UNMEASURED else f"**{row.state}**"
    yield row.meaning
    yield "<br>".join(f"[`{test.split('::')[-1]}`](../{test.split('::')[0]})" for test in row.tests)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
