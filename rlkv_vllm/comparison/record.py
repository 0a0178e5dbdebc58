"""The results of a comparison: written after every measurement, continued by the same command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.stored import StoredAnswers, stored_answers
from rlkv_vllm.files import one_line
from rlkv_vllm.store import Store, differences
from rlkv_vllm.tasks.measurement import Measurement

FORMAT = "rlkv compare 1"
_FIX = "choose another --output, or measure everything again with --fresh"

#: One profile of one method: seed, cost, full heads and digest of its allocations by sparsity.
RunRow = dict[str, Any]


class Record:
    """The file `compare.json` of a comparison.

    Methods, seeds, sparsities and models may be added to it, and left out of a later command: the
    report is of what the last one asked for.

    Args:
        path: of the file.
        settings: what all answers have in common, as plain JSON values.
        models: what all answers of a model have in common, by label.
        asked: what the report is about.
        command: how to repeat the comparison.
        machine: that measures.
        fresh: forget what the file holds.

    Raises:
        RlkvError: the file has other settings, or is of another kind.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        models: Mapping[str, Mapping[str, Any]],
        *,
        asked: Mapping[str, Any],
        command: str,
        machine: Mapping[str, Any],
        fresh: bool = False,
    ) -> None:
        self._store = Store(path, FORMAT, settings, fresh=fresh, fix=_FIX)
        self.content = content = self._store.content
        content.setdefault("machine", dict(machine))
        commands = [*content.get("commands", []), command]
        content["commands"] = list(dict.fromkeys(commands))
        content["asked"] = dict(asked)
        stored = content.setdefault("models", {})
        self._answers: dict[tuple[str, str], Measurement] = {}
        for label, wanted in models.items():
            entry = stored.setdefault(label, {"settings": dict(wanted), "answers": {}, "runs": []})
            found = differences(entry["settings"], wanted)
            if found:
                raise RlkvError(
                    f"--output {one_line(path)}: model {label} has other settings there "
                    f"({'; '.join(found)}): give it another label, or {_FIX}"
                )
            for digest, raw in entry["answers"].items():
                self._answers[label, digest] = self._read(label, raw)

    @property
    def settings(self) -> dict[str, Any]:
        return self._store.settings

    def find(self, model: str, digest: str) -> Measurement | None:
        """The answers with the allocation of this digest, if they are there."""
        return self._answers.get((model, digest))

    def add(self, model: str, digest: str, measured: Measurement) -> None:
        """Add answers and write the file."""
        self._answers[model, digest] = measured
        date = datetime.now(UTC).isoformat(timespec="seconds")
        entry = stored_answers(measured) | {"date": date}
        self.content["models"][model]["answers"][digest] = entry
        self._store.save()

    def set_runs(self, model: str, runs: Sequence[RunRow]) -> None:
        """Replace the runs of the methods and seeds in `runs`, and write the file."""
        entry = self.content["models"][model]
        new = {(run["method"], run["seed"]) for run in runs}
        kept = [run for run in entry["runs"] if (run["method"], run["seed"]) not in new]
        entry["runs"] = [*kept, *runs]
        self._store.save()

    def _read(self, label: str, raw: Any) -> Measurement:
        where = f"--output {one_line(self._store.path)}: answers of model {label}"
        try:
            measured = StoredAnswers.model_validate(raw).measurement()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "row"
            raise RlkvError(f"{where}: {field}: {one_line(first['msg'])}: {_FIX}") from error
        wanted = {"n": measured.n, "samples": measured.samples}
        if found := differences(self.settings, wanted):
            raise RlkvError(f"{where}: {'; '.join(found)}: {_FIX}")
        return measured
