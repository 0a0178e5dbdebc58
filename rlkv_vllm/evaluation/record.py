"""The files of an evaluation: finished rows, and what an interrupted run left."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.splits import Split
from rlkv_vllm.evaluation.stored import StoredAnswers, stored_answers
from rlkv_vllm.files import one_line, write_bytes_atomic
from rlkv_vllm.profile.budget import Assessment, Verdict
from rlkv_vllm.profile.schema import EvaluationRow
from rlkv_vllm.statistics import sign_test_p
from rlkv_vllm.store import Store
from rlkv_vllm.tasks.measurement import Measurement

FORMATS = ("json", "csv")

_FORMAT = "rlkv eval 2"
_FIX = "name another file, or overwrite it with --fresh"
_PER_ANSWER = ("split", "correct", "cut", "output_lengths")  # not in CSV


@dataclass(frozen=True)
class Row:
    """A row of the table.

    `full` is the measurement with the full cache, of as many problems or more. `p_full` is the
    p-value of the two-sided sign test against it, over the problems; with one answer per problem
    that is McNemar's test. It is None for the full cache itself.
    """

    split: Split
    measurement: Measurement
    full: Measurement
    assessment: Assessment

    @cached_property
    def p_full(self) -> float | None:
        if self.split.sparsity == 0:
            return None
        full = self.full.first(self.measurement.n)
        return sign_test_p(
            full.solved_per_problem, self.measurement.solved_per_problem, "two-sided"
        )

    @property
    def evaluation(self) -> EvaluationRow:
        """As a profile holds it."""
        return self.assessment.row

    @property
    def verdict(self) -> Verdict:
        return self.assessment.verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        measured = self.measurement
        low, high = measured.interval
        return {
            "profile": self.split.label,
            "sparsity": self.split.sparsity,
            **self.split.span._asdict(),
            "n": measured.n,
            "samples": measured.samples,
            "solved": measured.solved,
            "accuracy": measured.accuracy,
            "low": low,
            "high": high,
            "mean_output_tokens": measured.mean_output_tokens,
            "p95_output_tokens": measured.p95_output_tokens,
            "capped": measured.capped,
            "capped_share": measured.capped_share,
            "seconds": measured.seconds,
            "seconds_per_solved": measured.seconds_per_solved,
            "p_full": self.p_full,
            **self._budget(),
            "split": self.split.digest,
            **stored_answers(measured),  # the keys above keep their places
        }

    def _budget(self) -> dict[str, Any]:
        loss, length, cut = self.assessment.measures
        return {
            "loss": loss.estimate,
            "loss_at_most": loss.high,
            "length_ratio": _finite(length.estimate),
            "length_ratio_at_most": _finite(length.high),
            "more_capped": cut.estimate,
            "more_capped_at_most": cut.high,
            "max_loss": loss.limit,
            "verdict": str(self.verdict),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _StoredRow(StoredAnswers):
    """What is read back of a row; the rest follows from it."""

    profile: str
    sparsity: float
    split: str


class Record:
    """The `.json` and `.csv` files of one evaluation; only JSON files can be continued.

    `settings` are those of all rows, `looks` included, as plain JSON values.

    Raises:
        RlkvError: if a file exists that this evaluation cannot continue.
    """

    def __init__(
        self, paths: Sequence[Path], settings: Mapping[str, Any], *, fresh: bool = False
    ) -> None:
        self._tables = [path for path in paths if output_format(path) == "csv"]
        self._stores = [
            Store(path, _FORMAT, settings, fresh=fresh, fix=_FIX)
            for path in paths
            if path not in self._tables
        ]
        self._rows: list[dict[str, Any]] = []  # as they are written
        self._known: dict[str, Measurement] = {}
        for store in self._stores:
            self._read(store)

    def find(self, split: Split) -> Measurement | None:
        """The measurement of this split or of one that serves alike."""
        return self._known.get(split.digest)

    def add(self, row: Row) -> Row:
        """Add or replace a row and write all files.

        Raises:
            RlkvError: if a file cannot be written.
        """
        new = row.to_dict()
        self._known[row.split.digest] = row.measurement
        # Rows of earlier runs with other profiles or sparsities stay.
        place = (new["profile"], new["sparsity"])
        kept = [old for old in self._rows if (old["profile"], old["sparsity"]) != place]
        self._rows = [*kept, new]
        files = {path: self._table().encode() for path in self._tables}
        for store in self._stores:
            store.content["rows"] = self._rows
            files[store.path] = store.text().encode()
        write_bytes_atomic(files)
        return row

    def _table(self) -> str:
        buffer = io.StringIO()
        names = [name for name in self._rows[0] if name not in _PER_ANSWER]
        writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        return buffer.getvalue()

    def _read(self, store: Store) -> None:
        where = f"--output {one_line(store.path)}"
        rows = store.content.get("rows", [])
        if not isinstance(rows, list):
            raise RlkvError(f"{where}: rows: not a list: {_FIX}")
        for raw in rows:
            try:
                row = _StoredRow.model_validate(raw)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = ".".join(map(str, first["loc"])) or "row"
                raise RlkvError(f"{where}: {field}: {one_line(first['msg'])}: {_FIX}") from error
            looks = {problems for problems, _ in store.settings["looks"]}
            if len(row.correct) not in {row.samples * problems for problems in looks}:
                raise RlkvError(
                    f"{where}: row {one_line(row.profile)} has another number of problems: {_FIX}"
                )
            self._known[row.split] = row.measurement()
            self._rows.append(raw)


def output_format(path: Path) -> str:
    """The format that the suffix of `path` chooses.

    Raises:
        RlkvError: if it is none of `FORMATS`.
    """
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise RlkvError(f"--output {one_line(path)}: must end in .{' or .'.join(FORMATS)}")
    return suffix
