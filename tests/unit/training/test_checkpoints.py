"""Which checkpoint a run resumes from; its files are of any content here."""

from pathlib import Path

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.training.checkpoints import last_checkpoint, mark_complete
from tests.support.profiles import assert_one_line

FILES = (
    "gates.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "shards/0.bin",
)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    for step in (8, 10):  # "10" < "8" as text
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "shards").mkdir(parents=True)
        for name in FILES:
            (folder / name).write_bytes(name.encode() * step)
        mark_complete(folder, step)
    (tmp_path / "checkpoint-mine").mkdir()
    return tmp_path


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-1], "zeros": bytes(len(content))}[kind])


def test_the_newest_is_taken_if_it_is_whole(output: Path) -> None:
    said: list[str] = []
    assert last_checkpoint(output, said.append) == output / "checkpoint-10"
    assert said == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", "missing"), ("empty", "empty"), ("cut", "cut off"), ("zeros", "changed")],
)
def test_a_damaged_one_is_named_and_left_out(
    output: Path, name: str, kind: str, words: str
) -> None:
    damage(output / "checkpoint-10" / name, kind)
    said: list[str] = []
    assert last_checkpoint(output, said.append) == output / "checkpoint-8"
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint-10 is not used: {name} is ")
    assert words in said[0]
    damage(output / "checkpoint-8" / "scheduler.pt", kind)
    with pytest.raises(RlkvError) as caught:
        last_checkpoint(output)
    assert_one_line(caught.value, f"--resume: {output}", "checkpoint-10: ", "8: scheduler.pt is")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "was not written to its end"),
        ("empty", "complete.json is empty or cut off"),
        ("cut", "complete.json is empty or cut off"),
    ],
)
def test_the_record_of_the_files_may_be_damaged(output: Path, kind: str, words: str) -> None:
    mark = output / "checkpoint-10" / "complete.json"
    mark.write_text(mark.read_text().rstrip())
    damage(mark, kind)
    said: list[str] = []
    assert last_checkpoint(output, said.append) == output / "checkpoint-8"
    assert words in said[0]


def test_a_run_that_was_killed_in_its_first_checkpoint_begins_anew(output: Path) -> None:
    for step in (8, 10):
        (output / f"checkpoint-{step}" / "complete.json").unlink()
    assert last_checkpoint(output) is None
