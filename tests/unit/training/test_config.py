from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.options import save_options
from rlkv_vllm.training.config import EvaluationConfig, load_config, make_config
from tests.support import ROOT

SHIPPED = sorted((ROOT / "head_profiles" / "runs").glob("*.yaml"))
EMBEDDED = next(path for path in SHIPPED if path.stem == "embedded")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.trainer["num_generations"] == 4
    assert config.sink is not None
    assert config.window is not None


def test_there_are_shipped_configurations() -> None:
    assert [path.stem for path in SHIPPED] == [
        "audit",
        "deepseek-r1-distill-llama-8b",
        "embedded",
        "qwen3-4b-thinking",
    ]


def test_run_file_round_trips(tmp_path: Path) -> None:
    config = load_config(EMBEDDED, ["seed=3", "trainer.reg=0.5", "task.name=hops"])
    save_options(config, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config
    assert (config.seed, config.trainer["reg"], config.task.name) == (3, 0.5, "hops")
    assert "Versions: rlkv-vllm" in (tmp_path / "run.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sink=-1", "sink: Input should be greater than or equal to 0"),
        ("colour=red", "colour: Extra inputs are not permitted"),
        ("trainer.colour=red", "trainer.colour is no option of RlkvConfig"),
        ("trainer.beta=0.1", "trainer.beta is set by the job"),
        ("evaluation.sparsities=[2]", "evaluation.sparsities.0"),
        ("refine.enabled=true", "refinement is a command of its own"),
        ("refine.rounds=2", "refine: Extra inputs are not permitted"),
        ("rollout.staleness=-1", "rollout.staleness"),
        ("rollout.staleness=2", "choose another rollout.engine"),
        ("trainer.eval_strategy=steps", "trainer.eval_strategy is set by the job"),
        ("trainer.reg=much", "trainer.reg much: must be a number"),
        ("seed", "give key=value"),
        ("seed.more=1", "seed is no section"),
        ("seed=[", "value is not YAML"),
    ],
)
def test_bad_values_are_named(change: str, message: str) -> None:
    with pytest.raises(RlkvError) as error:
        load_config(EMBEDDED, [change])
    assert message in str(error.value)


def test_numbers_may_be_written_with_an_exponent() -> None:
    assert load_config(EMBEDDED, ["trainer.reg=1e-3"]).trainer["reg"] == 1e-3


def test_the_run_file_of_a_run_before_rlkv_refine_is_read(tmp_path: Path) -> None:
    config = load_config(EMBEDDED)
    content = config.model_dump(mode="json")
    section = {"enabled": False, "start": None, "sparsities": [0.4], "reach": 10}
    assert make_config({**content, "refine": section}, "run.yaml") == config
    with pytest.raises(RlkvError, match=r"`rlkv refine OUTPUT/profile\.json`"):
        make_config({**content, "refine": {**section, "enabled": True}}, "run.yaml")


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with pytest.raises(RlkvError, match=r"job\.yaml: no such file"):
        load_config(path)
    path.write_text("a: [")
    with pytest.raises(RlkvError, match="not valid YAML"):
        load_config(path)
    path.write_text("- 1")
    with pytest.raises(RlkvError, match="no mapping"):
        load_config(path)


def test_yaml_loads_no_code(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("output: !!python/object/apply:os.system ['true']")
    with pytest.raises(RlkvError, match="not valid YAML"):
        load_config(path)


def test_output_is_required() -> None:
    with pytest.raises(RlkvError, match="output: Field required"):
        make_config(yaml.safe_load("model: embedded"), "job.yaml")


def test_the_evaluation_samples_as_the_job_does() -> None:
    job = Sampling(max_tokens=50, temperature=0.6, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    assert EvaluationConfig().sampling(job, 4) == job.model_copy(update={"seed": 4})
    longer = EvaluationConfig(max_new_tokens=80, samples=4).sampling(job, 4)
    assert longer == job.model_copy(update={"seed": 4, "max_tokens": 80})
    greedy = EvaluationConfig(greedy=True).sampling(job, 4)
    assert greedy == Sampling(max_tokens=50, temperature=0, seed=4)
    for config, asked in (
        (EvaluationConfig(greedy=True, samples=2), job),
        (EvaluationConfig(samples=2), greedy),
    ):
        with pytest.raises(RlkvError, match=r"evaluation\.samples 2: greedy"):
            config.sampling(asked, 4)
