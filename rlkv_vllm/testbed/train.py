"""Training of the embedded reasoner, on one core in minutes.

Muon on the hidden matrices and AdamW on the rest, cross-entropy on completions only, and a
curriculum that enlarges the problems as fast as the model masters them. A run is a function of
its configuration: the data of a step depend on seed and step alone, so that a resumed run ends
in the same state as one that was never interrupted.

The shipped weights were made with a Muon of our own, which iterated in float32 where
`torch.optim.Muon` iterates in bfloat16: a run of today gives other weights and, on a CPU without
bfloat16 arithmetic, takes longer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, write_bytes_atomic
from rlkv_vllm.models import model_source
from rlkv_vllm.store import differences
from rlkv_vllm.tasks.puzzles import FAMILIES, LONG_FAMILIES, ReasonedProblem, make_problem
from rlkv_vllm.testbed.export import MODEL_FILE, export
from rlkv_vllm.testbed.model import MAX_LENGTH, build_model
from rlkv_vllm.testbed.tokenizer import build_tokenizer, training_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

CHECKPOINT = "checkpoint.safetensors"
_IGNORED = -100
_PIVOT_WEIGHT = 8.0  # of the few words that decide how long an answer is; others have 1
_USUAL_STEPS_PER_SIZE = 20  # that a size takes to be mastered, once the first one is


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the defaults are those of the shipped weights.

    Attributes:
        seed: of the initial weights and of the data.
        max_steps: where to stop when the curriculum has not ended the run before.
        batch_tokens: tokens in a batch, prompts included.
        muon_lr: peak learning rate of the hidden matrices.
        adam_lr: peak learning rate of embeddings and norms.
        warmup_steps: linear warm-up of both learning rates.
        first_scale: size of the problems at the start, in (0, 1].
        scale_step: how much they grow each time the model masters them.
        master_accuracy: running token accuracy from which a size is mastered.
        decay_accuracy: running token accuracy at full size from which the learning rate decays.
        decay_steps: length of the linear decay to zero, the end of the run.
        checkpoint_steps: how often the state is saved.
        family: the one family to train on; None is the mix that the shipped model knows.
        init: model to start from, `embedded` or a folder of this command; None: random weights.
    """

    seed: int = 0
    max_steps: int = 6000
    batch_tokens: int = 2000
    muon_lr: float = 2e-3
    adam_lr: float = 2.5e-3
    warmup_steps: int = 50
    first_scale: float = 0.15
    scale_step: float = 0.04
    master_accuracy: float = 0.93
    decay_accuracy: float = 0.97
    decay_steps: int = 500
    checkpoint_steps: int = 200
    family: str | None = None
    init: str | None = None

    @classmethod
    def of(cls, family: str | None, **options: Any) -> TrainingConfig:
        """The defaults for a family, changed by `options`.

        Most words of a long answer follow from the few before them, so there a size is mastered
        at a higher token accuracy.
        """
        if family in LONG_FAMILIES:
            options = {**_LONG_ANSWERS, **options}
        return cls(family=family, **options)


_LONG_ANSWERS = {
    "batch_tokens": 3000,
    "master_accuracy": 0.98,
    "decay_accuracy": 0.99,
    "decay_steps": 400,
}


@dataclass
class TrainingState:
    """Where a run is.

    Attributes:
        step: steps done.
        scale: present size of the problems.
        accuracy: running token accuracy.
        loss: running loss, nats per token.
        decay_start: the step at which the decay began, if it has.
    """

    step: int = 0
    scale: float = 0.0
    accuracy: float = 0.0
    loss: float = 0.0
    decay_start: int | None = None

    def learning_rate(self, config: TrainingConfig) -> float:
        """The factor on the peak learning rates, in [0, 1]."""
        factor = min(1.0, (self.step + 1) / config.warmup_steps)
        if self.decay_start is not None:
            factor *= max(0.0, 1 - (self.step - self.decay_start) / config.decay_steps)
        return factor

    def is_done(self, config: TrainingConfig) -> bool:
        """Whether the curriculum or the step limit has ended the run."""
        if self.decay_start is not None and self.step >= self.decay_start + config.decay_steps:
            return True
        return self.step >= config.max_steps

    def expected_steps(self, config: TrainingConfig) -> int:
        """Estimated steps of the run, if every size is mastered as fast as usual."""
        if self.is_done(config):
            return self.step
        if self.decay_start is not None:
            end = self.decay_start + config.decay_steps
        else:
            sizes = (1.0 - self.scale) / config.scale_step
            end = self.step + round(sizes * _USUAL_STEPS_PER_SIZE) + config.decay_steps
        return min(end, config.max_steps)


class TestbedTrainer:
    """Model, optimisers and curriculum of one run.

    Args:
        config: how to train.
    """

    __test__ = False  # not a test class, in spite of its name

    def __init__(self, config: TrainingConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.state = TrainingState(scale=config.first_scale)
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer(MAX_LENGTH, config.family)
        self.model: Qwen3ForCausalLM = build_model(
            len(self.tokenizer), self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        )
        if config.init is not None:
            start_from(config.init, self.model, self.tokenizer)
        self.model.train()
        hidden: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, weight in self.model.named_parameters():
            (hidden if weight.dim() == 2 and "embed" not in name else rest).append(weight)
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            # Scaled to the update size of AdamW (Liu et al. 2025, arXiv 2502.16982).
            torch.optim.Muon(
                hidden, lr=config.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._peaks = (config.muon_lr, config.adam_lr)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch of the present step: ids, labels, their weights, each [problems, length]."""
        config = self.config
        rng = random.Random(f"train-{config.seed}-{self.state.step}")
        rows: list[tuple[list[int], int, ReasonedProblem]] = []
        longest = 0
        while True:
            scale = self.state.scale
            if rng.random() < 0.25:
                scale *= rng.uniform(0.3, 1.0)
            family = config.family or rng.choice(FAMILIES)
            problem = make_problem(family, rng, scale, with_faults=True)
            prompt, completion = training_texts(problem)
            prompt_ids = self._encode(prompt)
            ids = prompt_ids + self._encode(completion)
            longest = max(longest, len(ids))
            if rows and longest * (len(rows) + 1) > config.batch_tokens:
                break
            rows.append((ids, len(prompt_ids), problem))
        longest = max(len(ids) for ids, _, _ in rows)
        inputs = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), _IGNORED)
        weights = torch.ones((len(rows), longest))
        for i, (ids, prompt_length, problem) in enumerate(rows):
            inputs[i, : len(ids)] = torch.tensor(ids)
            labels[i, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
            for place in problem.injected:
                labels[i, prompt_length + place] = _IGNORED
            for place in problem.pivots:
                weights[i, prompt_length + place] = _PIVOT_WEIGHT
        return inputs, labels, weights

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def step(self) -> None:
        """One optimiser step and, every tenth, a look at the curriculum."""
        config, state = self.config, self.state
        inputs, labels, weights = self.batch()
        # Padding is on the right, where causal attention cannot see it: no mask needed.
        hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        wanted = targets != _IGNORED
        logits = self.model.lm_head(hidden[:, :-1][wanted])
        loss, accuracy = _loss_and_accuracy(logits, targets[wanted], weights[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = state.learning_rate(config)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = min(0.9, state.step / (state.step + 1))
        state.accuracy = keep * state.accuracy + (1 - keep) * accuracy.item()
        state.loss = keep * state.loss + (1 - keep) * loss.item()
        state.step += 1
        if state.step % 10 == 0 and state.decay_start is None:
            if state.scale < 1.0 and state.accuracy > config.master_accuracy:
                state.scale = min(1.0, state.scale + config.scale_step)
            elif state.scale >= 1.0 and state.accuracy > config.decay_accuracy:
                state.decay_start = state.step

    # --- checkpoints -----------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write weights, optimisers and curriculum to one file, atomically.

        Not a `Store`, because it holds tensors: safetensors, with the curriculum and the
        configuration as JSON in its header.
        """
        from safetensors.torch import save

        tensors = {f"model.{name}": weight for name, weight in self.model.named_parameters()}
        for number, optimizer in enumerate(self._optimizers):
            for index, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    tensors[f"optimizer.{number}.{index}.{key}"] = value
        record = {
            "config": asdict(self.config),
            "state": asdict(self.state),
            "optimizers": self._optimizer_names(),
        }
        content = save(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            metadata={"testbed": json.dumps(record)},
        )
        write_bytes_atomic({path: content})

    def _optimizer_names(self) -> list[str]:
        return [type(optimizer).__qualname__ for optimizer in self._optimizers]

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            RlkvError: if the file is no checkpoint or one of another configuration.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["testbed"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RlkvError(
                f"{path}: no checkpoint of `rlkv testbed train` ({error}): delete it and start anew"
            ) from error
        if record.get("optimizers") != self._optimizer_names():
            raise RlkvError(
                f"{path}: of another version of `rlkv testbed train`, with other optimisers: "
                "delete it and start anew"
            )
        ours = asdict(self.config)
        if found := differences(record["config"], ours):
            raise RlkvError(
                f"{path}: has other settings ({'; '.join(found)}): resume with the same options, "
                "or choose another --output"
            )
        self.state = TrainingState(**record["state"])
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"model.{name}"])
        for number, optimizer in enumerate(self._optimizers):
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                if kind != "optimizer" or not rest.startswith(f"{number}."):
                    continue
                _, index, key = rest.split(".")
                entries.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})


def start_from(source: str, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy the weights of a finished model of this command into `model`.

    Words that only `model` knows come last in its vocabulary and keep their random embeddings.

    Args:
        source: `embedded` or the folder of the model.
        model: changed in place.
        tokenizer: of `model`.

    Raises:
        RlkvError: if the folder holds no such model, or one of another shape or vocabulary.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(model_source(source))
    words_file = folder / "tokenizer.json"
    try:
        weights = load_file(folder / MODEL_FILE)
        theirs = json.loads(words_file.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RlkvError(
            f"--init {source}: no model of `rlkv testbed train` ({one_line(error)}): give "
            "`embedded` or the folder of a finished run"
        ) from error
    ours = tokenizer.get_vocab()
    moved = [word for word, number in theirs.items() if ours.get(word) != number]
    if moved:
        raise RlkvError(
            f"--init {source}: its vocabulary is another one ({moved[0]} is word "
            f"{theirs[moved[0]]} there): start from a model of the same --family or from `embedded`"
        )
    embeddings = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        given = weights.get(name)
        n = len(theirs) if weight is embeddings else weight.shape[0]
        if given is None or given.shape != weight[:n].shape:
            shape = "missing" if given is None else f"of shape {tuple(given.shape)}"
            raise RlkvError(
                f"--init {source}: {name} is {shape}, this model needs {tuple(weight[:n].shape)}: "
                "start from a model of this command"
            )
        with torch.no_grad():
            weight[:n].copy_(given)


def _loss_and_accuracy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means over the targets.

    Args:
        logits: [targets, vocabulary].
        targets: [targets].
        weights: [targets].
    """
    right = (logits.argmax(-1) == targets).float()
    if (weights == 1).all():  # the same sums, to the last bit, as for the shipped weights
        return torch.nn.functional.cross_entropy(logits, targets), right.mean()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), (right * weights).sum() / weights.sum()


def run(
    config: TrainingConfig,
    output: Path,
    *,
    resume: bool = False,
    report: Callable[[TrainingState], None] = lambda state: None,
) -> TestbedTrainer:
    """Train to the end, with a checkpoint in `output` every `checkpoint_steps`.

    One thread: two of them gain little at this size and lose much where a core is shared.

    Args:
        config: how to train.
        output: folder of the checkpoint.
        resume: continue from its checkpoint, if there is one.
        report: called after every step.

    Raises:
        RlkvError: if `output` holds a finished model, a checkpoint that does not fit, or any
            checkpoint without `resume`.
    """
    torch.set_num_threads(1)
    checkpoint = output / CHECKPOINT
    if (output / MODEL_FILE).exists():
        raise RlkvError(f"{output}: holds a finished model: choose another --output")
    trainer = TestbedTrainer(config)
    if checkpoint.exists():
        if not resume:
            raise RlkvError(
                f"{checkpoint}: holds an earlier run: give --resume to continue it, or choose "
                "another --output"
            )
        trainer.load(checkpoint)
    while not trainer.state.is_done(config):
        trainer.step()
        if trainer.state.step % config.checkpoint_steps == 0:
            trainer.save(checkpoint)
        report(trainer.state)
    trainer.save(checkpoint)
    return trainer


def train(
    config: TrainingConfig,
    output: Path,
    *,
    resume: bool = False,
    report: Callable[[TrainingState], None] = lambda state: None,
    measure: int = 300,
) -> dict[str, Any]:
    """Train, measure, and write the model to `output`; the checkpoint goes when it is there.

    Args:
        config: how to train.
        output: folder of the model.
        resume: continue from its checkpoint, if there is one.
        report: called after every step.
        measure: number of problems to measure accuracy with.

    Returns:
        What `metrics.json` holds.

    Raises:
        RlkvError: as `run`, or if the folder cannot be written.
    """
    trainer = run(config, output, resume=resume, report=report)
    record = {"config": asdict(config), "state": asdict(trainer.state)}
    metrics = export(
        trainer.model, trainer.tokenizer, output, run=record, family=config.family, n=measure
    )
    (output / CHECKPOINT).unlink(missing_ok=True)
    return metrics
