"""RLKV on TRL: GRPO whose only parameters are the gates of the KV heads.

Differs from `trl.GRPOTrainer` in six places: the loss has the adaptive penalty on the gates,
gates are clamped after every step, checkpoints hold gates instead of weights, the reward text
keeps special tokens, answers may come from an engine in gated mode, and advantages may be
normalised over the batch.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import write_bytes_atomic
from rlkv_vllm.hf.gated_attention import GatedAttention
from rlkv_vllm.rollouts.protocol import Rollouts
from rlkv_vllm.rollouts.queue import RolloutQueue
from rlkv_vllm.tasks import Problem, Task, output_text
from rlkv_vllm.training.advantage import batch_advantages
from rlkv_vllm.training.checkpoints import COMPLETE_FILE, mark_complete
from rlkv_vllm.training.penalty import penalty_weight

GATES_FILE = "gates.safetensors"


@dataclass
class RlkvConfig(GRPOConfig):
    """Options of `RlkvTrainer`: those of TRL's GRPOConfig with the published defaults, and ours.

    Published settings: arXiv 2510.08525, section 4 and appendix.

    Attributes:
        reg: strength of the penalty on the mean gate.
        tau: mean reward below which there is no penalty.
        collapse_steps: steps in a row with a reward below `tau` after which the run stops.
        average_steps: the profile's gates are the mean over so many last steps.
        rollout_batch_size: answers generated together on one device, the rest after them; None:
            all of a step. Bounds the memory of the KV cache.
        max_logprob_difference: mean difference of a token's log-probability between this trainer
            and the engine that sampled it with the same gates, above which the run stops.
        advantage: over what rewards are normalised: `group`, the answers to one problem (TRL), or
            `batch`, all answers of a step, weighted by their tokens (the authors).
        scale_rewards: TRL's, with `advantage` group only.
    """

    learning_rate: float = 1e-2
    lr_scheduler_type: str = "constant"
    weight_decay: float = 0.017
    max_grad_norm: float = 1.0
    epsilon: float = 0.4
    num_generations: int = 4
    beta: float = 0.0
    max_completion_length: int = 7168
    reg: float = 1e-3
    tau: float = 0.5
    collapse_steps: int = 20
    average_steps: int = 1
    rollout_batch_size: int | None = None
    max_logprob_difference: float = 0.1
    advantage: Literal["group", "batch"] = "group"
    scale_rewards: str | bool | None = None  # None, for TRL's default, tells that it was not given

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage not in ("group", "batch"):
            raise ValueError(f"advantage {self.advantage}: choose from group, batch")
        if self.advantage == "batch" and (
            self.scale_rewards is not None
            or self.multi_objective_aggregation != "sum_then_normalize"
        ):
            raise ValueError(
                "advantage batch: normalises rewards itself: leave out scale_rewards and "
                "multi_objective_aggregation, or choose advantage group"
            )
        if self.scale_rewards is None:
            self.scale_rewards = "group"
        if self.use_vllm:
            raise ValueError("use_vllm: TRL's vLLM has no gates; use the job's `rollout`")
        if self.reg < 0 or not 0 <= self.tau <= 1:
            raise ValueError(f"reg {self.reg}, tau {self.tau}: reg must be >= 0, tau in [0, 1]")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0, answers must vary")
        lengths = ("max_completion_length", "collapse_steps", "average_steps", "rollout_batch_size")
        for name in lengths:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")


class RlkvTrainer(GRPOTrainer):
    """Trains the gates of a model, whose weights are frozen, by GRPO on its own answers.

    With `rollouts` these sample the answers instead of transformers' generate, and TRL corrects
    for their log-probabilities (`vllm_importance_sampling_*` of the options). The gates that
    sampled a batch may be `staleness` steps older than the step that trains on it; above 0 the
    answers of the next steps are written meanwhile.
    """

    def __init__(
        self,
        gates: GatedAttention,
        task: Task,
        args: RlkvConfig,
        problems: Sequence[Problem],
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
        rollouts: Rollouts | None = None,
        staleness: int = 0,
    ) -> None:
        self.gates, self.rollouts, self._staleness = gates, rollouts, staleness
        self._queue: RolloutQueue | None = None
        # Batches of the next steps, whose answers are asked for; and how many were ever fetched.
        self._fetched: deque[tuple[list[Any], Any]] = deque()
        self._num_fetched = self._lag = 0
        super().__init__(
            model=gates.model,
            reward_funcs=_reward_function(task, processing_class),
            args=args,
            # As JSON: `datasets` would give the extras of all problems the same keys.
            train_dataset=Dataset.from_list(
                [
                    {"prompt": p.messages, "answer": p.answer, "extra": json.dumps(dict(p.extra))}
                    for p in problems
                ]
            ),
            processing_class=processing_class,
            callbacks=list(callbacks),
        )
        # After TRL could have started an engine of its own: for its correction by the engine's
        # log-probabilities.
        self.use_vllm = rollouts is not None
        # It would print raw dictionaries between the lines of `callbacks`.
        self.remove_callback(PrinterCallback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'."""
        if self.rollouts is None:
            return super().train(*args, **kwargs)
        with closing(RolloutQueue(self.rollouts)) as self._queue:
            return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step; those of the next `staleness` steps are asked for as well."""
        if self._queue is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        # `values` on every process: may be a collective operation.
        self._queue.set_gates(self.gates.values(), step)
        # Nothing is fetched beyond the end of the epoch or of the run.
        ahead = min(self._staleness, self.state.max_steps - 1 - step)
        while len(self._fetched) <= ahead:
            found = super().get_batch_samples(
                epoch_iterator, self.args.gradient_accumulation_steps, device
            )
            if not found[0]:
                break
            self._ask(found[0], step + len(self._fetched), self._queue)
            self._fetched.append(found)
        return self._fetched.popleft() if self._fetched else ([], None)

    def _ask(self, batches: Sequence[Any], step: int, queue: RolloutQueue) -> None:
        """Ask for answers to those batches for which TRL will generate."""
        for i, batch in enumerate(batches):
            is_reused = self._num_fetched % (self.args.steps_per_generation * self.num_iterations)
            self._num_fetched += 1
            if is_reused:
                continue
            seed = hash((self.args.seed, step, i, self.accelerator.process_index)) % 2**31
            sampling = Sampling(
                max_tokens=self.max_completion_length,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p or 0.0,
                repetition_penalty=self.repetition_penalty,
                stop_token_ids=tuple(self.eos_token_ids),
                seed=seed,
            )
            queue.put(self._tokenize_prompts([row["prompt"] for row in batch])[0], sampling)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], Any]:
        if self._queue is not None:
            batch = self._queue.get()
            assert batch.prompts == prompt_ids
            self._lag = self.state.global_step - batch.step
            self._metrics["train"]["rlkv/gates_lag"].append(self._lag)
            return [a.token_ids for a in batch.answers], [a.logprobs for a in batch.answers]
        size = self.args.rollout_batch_size or len(prompt_ids)
        answers: list[list[int]] = []
        for start in range(0, len(prompt_ids), size):
            answers += super()._generate_single_turn(
                prompt_ids[start : start + size], *args, **kwargs
            )[0]
        return answers, None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # [answers of all processes, reward functions]; there is one function
        rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        self._rewards = rewards[:, 0]
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.args.advantage == "batch":
            self._normalise_over_batch(output)
        # A tensor with one entry per completion survives TRL's shuffle and split.
        metrics = self._metrics["train" if self.model.training else "eval"]
        # Older gates differ by what was trained since. The first batch of a run has the newest.
        if self.rollouts is not None and self._lag == 0:
            difference = metrics["sampling/sampling_logp_difference/mean"][-1]
            limit = self.args.max_logprob_difference
            if difference > limit:
                raise RlkvError(
                    f"rollout: log-probabilities of engine and trainer differ by {difference:.3g} "
                    f"on average, more than trainer.max_logprob_difference {limit:g}: the engine "
                    "serves another model, precision, sink or window; fix it and continue with "
                    "--resume"
                )
        output["rlkv_reward"] = torch.full_like(output["advantages"], metrics["reward"][-1])
        return output

    def _normalise_over_batch(self, output: dict[str, Any]) -> None:
        """Put advantages over the batch of all processes in place of TRL's."""
        local = output["completion_mask"].sum(1)
        everywhere = batch_advantages(self._rewards, self.accelerator.gather(local))
        start = self.accelerator.process_index * len(local)
        output["advantages"] = everywhere[start : start + len(local)]
        logged = self._logs["advantages"]  # for `log_completions`: TRL has just added its own
        for _ in range(len(everywhere)):
            logged.pop()
        logged.extend(everywhere.tolist())

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        reward = inputs["rlkv_reward"][0].item()
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        penalty = penalty_weight(reward, self.args.reg, self.args.tau) * self.gates.mean()
        self._metrics["train" if self.model.training else "eval"]["rlkv/penalty"].append(
            penalty.item()
        )
        return loss + penalty / self.current_gradient_accumulation_steps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As transformers', and gates stay in [0, 1]."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            self.gates.clamp_after(self.optimizer)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the gates; the weights are frozen and stay where they came from."""
        values = self.gates.values()  # on every process: may be a collective operation
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            content = save({"gates": torch.tensor(values, dtype=torch.float64)})
            write_bytes_atomic({folder / GATES_FILE: content})

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Does nothing: the product of a run is a head profile."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if self.args.should_save:  # the folder may have a broken one
            (folder / COMPLETE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / GATES_FILE
        try:
            values = load_file(path)["gates"]
        except (OSError, KeyError, SafetensorError) as error:
            raise RlkvError(
                f"{path}: no gates of `rlkv train` ({error}): delete this checkpoint and give "
                "--resume again"
            ) from error
        self.gates.set_soft(values.tolist())


def _reward_function(task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    def correctness(
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        extra: Sequence[str],
        **_: Any,
    ) -> list[float]:
        rewards = []
        for prompt, ids, gold, more in zip(prompts, completion_ids, answer, extra, strict=True):
            # TRL's own text lacks special tokens; for some models `<think>` is one.
            asked = tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True
            )
            text = output_text(tokenizer, str(asked), ids)
            problem = Problem(list(prompt), gold, json.loads(more))
            rewards.append(float(task.score(text, problem)))
        return rewards

    return correctness
