"""Answers of a training job: vLLM in gated mode against transformers' generate."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.bench.case import TRANSFORMERS, VLLM, Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import EngineSpec
from rlkv_vllm.machine import cpu_seconds
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.rollouts.protocol import Gates, Rollouts
from rlkv_vllm.tasks import get_task

#: Instead of a task, for models without a tokenizer; tokens of a prompt.
RANDOM, PROMPT = "random", 64


class TransformersRollouts:
    """The model that is trained, as `Rollouts` without log-probabilities."""

    def __init__(self, model: str, dtype: str, span: Span, *, is_random: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        from rlkv_vllm.hf.gated_attention import attach_gates
        from rlkv_vllm.hf.loading import load_model

        if is_random:
            config = AutoConfig.from_pretrained(model)
            dtype = "float32" if dtype == "auto" else dtype
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        else:
            self._model = load_model(model, dtype=dtype)[0]
        self._gates = attach_gates(self._model, *span)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        self._gates.set_soft(gates)
        torch.manual_seed(sampling.seed)
        rows = [torch.tensor(prompt, device=self._model.device) for prompt in prompts]
        ids, mask = (
            pad_sequence(each, batch_first=True, padding_side="left")
            for each in (rows, [torch.ones_like(row) for row in rows])
        )
        with torch.no_grad():
            found = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=list(sampling.stop_token_ids) or None,
                pad_token_id=0,
            )
        answers = []
        for new in found[:, ids.shape[1] :].tolist():
            ends = (i for i, token in enumerate(new, 1) if token in sampling.stop_token_ids)
            answers.append(Answer(new[: next(ends, None)]))
        return answers


class Writer:
    """Who writes the answers of a training job, as the variant says."""

    def __init__(self, spec: EngineSpec) -> None:
        from rlkv_vllm.hf.loading import set_threads
        from rlkv_vllm.rollouts.colocated import ColocatedRollouts

        assert spec.split is not None
        set_threads(spec.threads)  # vLLM takes as many as the trainer
        self.model, span = spec.model, Span(spec.split["sink"], spec.split["window"])
        options = dict(spec.options)
        dtype = options.pop("dtype")  # here "auto" is float32 on a CPU, as the trainer's
        self.rollouts: Rollouts
        if spec.variant == VLLM:
            self.rollouts = ColocatedRollouts(spec.model, None, dtype, span, options)
        else:
            is_random = options.get("load_format") == "dummy"
            self.rollouts = TransformersRollouts(spec.model, dtype, span, is_random=is_random)


class RolloutsCase(Case):
    """A batch of a training job: several answers to each prompt, sampled with one set of gates."""

    name = "rollouts"
    title = "Rollouts: answers of a training job"
    note = (
        "Not the split cache: answers of the model with gates, which `rlkv train` trains on, by "
        "transformers' generate and by vLLM in gated mode beside the trainer. Prompts, gates (at "
        "random, others in every turn) and sampling parameters are the same; a turn ends with the "
        "last answer. CPU time is that of all processes: compare it where other programs run."
    )
    variants: ClassVar[tuple[str, str]] = (TRANSFORMERS, VLLM)
    runs = "rollouts"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("tokens_per_s", "tok/s", more_is_better=True),
        Metric("tokens_per_cpu_s", "tok per second of CPU", more_is_better=True),
        Metric("mean_tokens", "mean tokens", is_ratio_shown=False),
    )
    columns: ClassVar[dict[str, str]] = {
        "task": "task",
        "prompts": "prompts",
        "samples": "answers to each",
        "tokens": "tokens, up to",
    }

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        # Random models end no answer.
        task, tokens = (setup.task, 200) if setup.has_tokenizer else (RANDOM, 64)
        return [
            {"task": task, "prompts": prompts, "samples": 4, "tokens": tokens}
            for prompts in ((8, 32) if full else (8,))
        ]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """No answer of vLLM's should wait; an estimate where a task's prompts are longer."""
        return setup.lacks(point["prompts"] * point["samples"], PROMPT + point["tokens"])

    def prepare(self, engine: Writer, point: Point) -> Any:
        """Prompts, end tokens and gates, and a first batch that is not timed."""
        ends: tuple[int, ...] = ()
        if point["task"] == RANDOM:
            prompts = [[5 + i] * PROMPT for i in range(point["prompts"])]
        else:
            from transformers import AutoTokenizer

            from rlkv_vllm.hf.answers import prompt_ids

            tokenizer = AutoTokenizer.from_pretrained(engine.model)
            ends = (tokenizer.eos_token_id,)
            problems = get_task(point["task"]).problems(point["prompts"], 1)
            prompts = prompt_ids(tokenizer, problems)
        state = prompts, ends, load_model_fingerprint(engine.model), random.Random(1)
        self.turn(engine, point | {"tokens": 8}, state)
        return state

    def turn(self, engine: Writer, point: Point, state: Any) -> dict[str, float]:
        """One batch, with gates of its own: they empty the prefix cache, as in a job."""
        prompts, ends, model, rng = state
        gates = [[rng.random() for _ in range(model.num_kv_heads)] for _ in range(model.num_layers)]
        seed = rng.randrange(2**31)
        sampling = Sampling(max_tokens=point["tokens"], stop_token_ids=ends, seed=seed)
        asked = [prompt for prompt in prompts for _ in range(point["samples"])]
        start, cpu_start = time.perf_counter(), cpu_seconds()
        answers = engine.rollouts.generate(asked, sampling, gates)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
        tokens = sum(len(answer.token_ids) for answer in answers)
        return {
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "tokens_per_cpu_s": tokens / cpu if cpu else 0.0,  # it is counted in ticks
            "mean_tokens": tokens / len(answers),
        }
