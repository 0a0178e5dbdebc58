"""Training of the embedded reasoner, on one core in minutes.

Muon on the hidden matrices and AdamW on the rest, cross-entropy on completions only, and a
curriculum that enlarges the problems as fast as the model masters them. A run is a function of
its configuration: the data of a step depend on seed and step alone, so that a resumed run ends
in the same state as one that was never interrupted.

The shipped weights were made with a Muon that iterated in float32, `torch.optim.Muon` iterates in
bfloat16: a run of today gives other weights and takes longer on a CPU without bfloat16 arithmetic.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, write_bytes_atomic
from rlkv_vllm.models import model_source
from rlkv_vllm.store import differences
from rlkv_vllm.tasks.puzzles import FAMILIES, LONG_FAMILIES, make_problem
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
    """How to train; the defaults are those of the shipped weights."""

    seed: int = 0  # of the initial weights and of the data
    max_steps: int = 6000  # where to stop when the curriculum has not ended the run before
    batch_tokens: int = 2000  # prompts included
    muon_lr: float = 2e-3  # peak, of the hidden matrices
    adam_lr: float = 2.5e-3  # peak, of embeddings and norms
    warmup_steps: int = 50  # linear, of both learning rates
    first_scale: float = 0.15  # size of the problems at the start, in (0, 1]
    scale_step: float = 0.04  # how much they grow each time the model masters them
    master_accuracy: float = 0.93  # running token accuracy from which a size is mastered
    decay_accuracy: float = 0.97  # the same at full size, from which the learning rates decay
    decay_steps: int = 500  # length of the linear decay to zero, the end of the run
    checkpoint_steps: int = 200  # between two checkpoints
    family: str | None = None  # the only one to train on; None: the mix of the shipped model
    init: str | None = None  # start from `embedded` or a folder of this command; None: random

    @classmethod
    def of(cls, family: str | None, **options: Any) -> TrainingConfig:
        """The defaults for a family, changed by `options`.

        Most words of a long answer follow from the few before them, so there a size is mastered
        at a higher token accuracy.
        """
        if family in LONG_FAMILIES:
            accuracies = {"master_accuracy": 0.98, "decay_accuracy": 0.99}
            options = {"batch_tokens": 3000, "decay_steps": 400, **accuracies, **options}
        return cls(family=family, **options)


@dataclass
class TrainingState:
    """Where a run is."""

    step: int = 0  # steps done
    scale: float = 0.0  # present size of the problems
    accuracy: float = 0.0  # running, of tokens
    loss: float = 0.0  # running, nats per token
    decay_start: int | None = None  # the step at which the decay began, if it has

    def learning_rate(self, config: TrainingConfig) -> float:
        """The factor on the peak learning rates, in [0, 1]."""
        factor = min(1.0, (self.step + 1) / config.warmup_steps)
        if self.decay_start is not None:
            factor *= max(0.0, 1 - (self.step - self.decay_start) / config.decay_steps)
        return factor

    def is_done(self, config: TrainingConfig) -> bool:
        """Whether the curriculum or the step limit has ended the run."""
        assert config.decay_steps > 0
        return self.step >= self.expected_steps(config)

    def expected_steps(self, config: TrainingConfig) -> int:
        """Steps of the run, estimated if it does not decay yet: sizes are mastered as usual."""
        decay_start = self.decay_start
        if decay_start is None:
            sizes = (1.0 - self.scale) / config.scale_step
            decay_start = self.step + round(sizes * _USUAL_STEPS_PER_SIZE)
        return min(decay_start + config.decay_steps, config.max_steps)


class TestbedTrainer:
    """Model, optimisers and curriculum of one run."""

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

    def batch(self) -> tuple[torch.Tensor, ...]:
        """The batch of the present step: ids, labels, their weights, each [problems, length]."""
        config = self.config
        rng = random.Random(f"train-{config.seed}-{self.state.step}")
        rows: list[tuple[list[float], ...]] = []
        longest = 0
        while True:
            scale = self.state.scale
            if rng.random() < 0.25:
                scale *= rng.uniform(0.3, 1.0)
            family = config.family or rng.choice(FAMILIES)
            problem = make_problem(family, rng, scale, with_faults=True)
            prompt, completion = (
                self.tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
                for text in training_texts(problem)
            )
            ids = prompt + completion
            longest = max(longest, len(ids))
            if rows and longest * (len(rows) + 1) > config.batch_tokens:
                break
            labels, weights = [_IGNORED] * len(prompt) + completion, [1.0] * len(ids)
            for place in problem.injected:
                labels[len(prompt) + place] = _IGNORED
            for place in problem.pivots:
                weights[len(prompt) + place] = _PIVOT_WEIGHT
            rows.append((ids, labels, weights))
        padding = self.tokenizer.pad_token_id, _IGNORED, 1.0
        return tuple(map(_padded, zip(*rows, strict=True), padding))

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
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
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
                    tensors[f"optimizer.{number}.{index}.{key}"] = value.contiguous()
        record = {
            "config": asdict(self.config),
            "state": asdict(self.state),
            "optimizers": self._optimizer_names(),
        }
        write_bytes_atomic({path: save(tensors, metadata={"testbed": json.dumps(record)})})

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
        if found := differences(record["config"], asdict(self.config)):
            raise RlkvError(
                f"{path}: has other settings ({'; '.join(found)}): resume with the same options, "
                "or choose another --output"
            )
        self.state = TrainingState(**record["state"])
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"model.{name}"])
        entries: list[Any] = [defaultdict(dict) for _ in self._optimizers]
        for name, tensor in tensors.items():
            match name.split("."):
                case "optimizer", number, index, key:
                    entries[int(number)][int(index)][key] = tensor
        for optimizer, entry in zip(self._optimizers, entries, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entry})


def start_from(source: str, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy the weights of a finished model of this command into `model`.

    Words that only `model` knows come last in its vocabulary and keep their random embeddings.

    Raises:
        RlkvError: if the folder holds no such model, or one of another shape or vocabulary.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(model_source(source))
    try:
        weights = load_file(folder / MODEL_FILE)
        theirs = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
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


def _padded(rows: Iterable[list[float]], value: float) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _loss_and_accuracy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means over the targets; `logits` are [targets, vocabulary]."""
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

    Refuses an `output` with a finished model, with a checkpoint that does not fit, or with any
    checkpoint without `resume`. One thread: two of them gain little at this size and lose much
    where a core is shared.
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
    """`run`, measure with `measure` problems, write the model to `output` without checkpoint.

    Returns what `metrics.json` holds; errors as of `run` and `export`.
    """
    trainer = run(config, output, resume=resume, report=report)
    record = {"config": asdict(config), "state": asdict(trainer.state)}
    metrics = export(
        trainer.model, trainer.tokenizer, output, run=record, family=config.family, n=measure
    )
    (output / CHECKPOINT).unlink(missing_ok=True)
    return metrics
