"""`rlkv`: gates trained by reinforcement learning on the model's own answers.

RLKV (arXiv 2510.08525). The same trainer as `rlkv train`, on the problems that the other scorers
see, without checkpoints and report: for comparisons. Long jobs belong to `rlkv train`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.options import Positive, Section
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput, Weight


class Settings(Section):
    """Settings; names and meaning as in `rlkv train`, `prompts` per step."""

    steps: Positive = 70
    learning_rate: Weight = 0.02
    reg: Weight = 0.02
    tau: Weight = 0.5
    temperature: Weight = 1.0
    prompts: Positive = 8
    num_generations: Positive = 4
    advantage: Literal["group", "batch"] = "group"


def score_heads(given: ScoringInput) -> Gates:
    """The gates of the last step at which the model still reasoned well."""
    try:
        from rlkv_vllm.training.run_log import RunLog, best_gates
        from rlkv_vllm.training.trainer import RlkvConfig, RlkvTrainer
    except ImportError as error:
        raise RlkvError(
            f"--method rlkv needs the training packages ({error}): pip install 'rlkv-vllm[train]'"
        ) from error
    from rlkv_vllm.hf.gated_attention import attach_gates

    options: Settings = given.settings
    longest = max(len(sample.completion_ids) for sample in given.samples)
    on_gpu = given.model.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        try:
            args = RlkvConfig(
                output_dir=folder,
                seed=given.seed,
                max_steps=options.steps,
                weight_decay=0.0,
                per_device_train_batch_size=min(options.prompts, len(given.problems))
                * options.num_generations,
                max_completion_length=round(longest * 1.25),
                gradient_checkpointing=on_gpu,
                use_cpu=not on_gpu,
                bf16=on_gpu,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **options.model_dump(exclude={"steps", "prompts"}),
            )
        except ValueError as error:
            raise RlkvError(f"--set: {error}") from error
        with attach_gates(given.model, given.sink, given.window) as gates:
            log = RunLog(
                output,
                gates,
                args.tau,
                args.collapse_steps,
                lambda row, total: given.report(row["step"], total, f"reward {row['reward']:.2f}"),
            )
            trainer = RlkvTrainer(gates, given.task, args, given.problems, given.tokenizer, [log])
            trainer.train()
        return best_gates(output, args.tau, args.average_steps)[0]


SCORER = Scorer("rlkv", "arXiv:2510.08525 (RLKV)", score_heads, Settings)
