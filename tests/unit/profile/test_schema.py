import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile import HeadProfile, ModelFingerprint
from rlkv_vllm.profile.io import load_profile, profile_text
from rlkv_vllm.profile.schema import json_schema_text
from tests.support import ROOT
from tests.support.profiles import assert_one_line, make_profile

PUBLISHED = ROOT / "docs" / "head_profile.schema.json"


def test_published_schema_is_current():
    assert PUBLISHED.read_text() == json_schema_text(), (
        "the format changed: rlkv profile schema > docs/head_profile.schema.json"
    )


def test_schema_accepts_what_is_written_and_describes_every_field():
    schema = json.loads(json_schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(profile_text(make_profile())), schema)
    records = [schema] + [schema["$defs"][name] for name in schema["$defs"] if name != "JsonValue"]
    for record in records:
        assert record["additionalProperties"] is False
        for name, field in record["properties"].items():
            assert field.get("description"), name


def test_schema_refuses_an_unknown_key():
    raw = json.loads(profile_text(make_profile()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw | {"gate": 1}, json.loads(json_schema_text()))


def test_sha256_depends_on_the_content_only():
    profile = make_profile()
    assert profile.sha256() == HeadProfile.model_validate(profile.model_dump()).sha256()
    assert profile.sha256() != make_profile(sink=17).sha256()
    assert len(profile.sha256()) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": [[0.5, 0.5]] * 3}, "3 rows but model.num_layers is 4"),
        ({"gates": [[0.5, 0.5]] * 2 + [[0.5]] + [[0.5, 0.5]]}, "row 2 has 1 columns"),
        ({"gates": [[0.5, 1.5]] * 4}, "less than or equal to 1"),
        ({"gates": [[0.5, math.nan]] * 4}, "finite"),
        ({"gates": [[0.5, -1e-9]] * 4}, "greater than or equal to 0"),
        ({"gates": []}, "at least 1"),
        ({"sink": -1}, "greater than or equal to 0"),
        ({"window": 0}, "greater than or equal to 1"),
        ({"recommended_sparsity": 1.01}, "less than or equal to 1"),
        ({"schema_version": 2}, "Input should be 1"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValidationError, match=message):
        make_profile(**changes)


def test_refuses_query_heads_that_kv_heads_do_not_divide():
    model = ModelFingerprint(
        id="x", model_type="qwen3", num_layers=4, num_query_heads=3, num_kv_heads=2, head_dim=8
    )
    with pytest.raises(ValidationError, match="not a multiple"):
        make_profile(model=model)


def test_config_must_be_finite_at_any_depth():
    provenance = make_profile().provenance
    with pytest.raises(ValidationError, match=r"config\.a\.list\.0\.dict\.b.*\n.*finite"):
        type(provenance)(**(provenance.model_dump() | {"config": {"a": [{"b": math.inf}]}}))


@pytest.mark.parametrize(
    ("row", "paired", "words"),
    [
        ({}, {"gained": 60, "lost": 60}, "paired.gained 60 and its opposite 60 exceed"),
        ({}, {"newly_cut": 101}, "paired.newly_cut 101 and its opposite 0 exceed"),
        ({}, {"gained": 2, "lost": 1}, "contradict accuracy 0.9 and full_accuracy 0.9"),
        ({"accuracy": 0.7}, {}, "contradict accuracy 0.7"),
        ({}, {"gained": 11, "lost": 11}, "contradict accuracy 0.9"),
        ({"capped_share": 0.3}, {}, "contradict capped_share 0.3 and full_capped_share 0.1"),
        ({"samples": 2, "accuracy": 0.895}, {"lost": 1}, None),
        ({"samples": 2}, {"lost": 2}, "of 200 answers contradict accuracy 0.9"),
        ({"capped_share": None}, {"newly_cut": 3}, None),
        ({}, {"level": 0.4}, "paired.level 0.4: Input should be less than or equal to 0.05"),
        ({}, {"gained": 3, "lost": 3, "newly_cut": 2, "no_longer_cut": 2}, None),
    ],
)
def test_counts_that_no_answers_have_are_refused(
    row: dict[str, Any], paired: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    counts = {"gained": 0, "lost": 0, "newly_cut": 0, "no_longer_cut": 0} | paired
    shares = {"accuracy": 0.9, "full_accuracy": 0.9, "capped_share": 0.1, "full_capped_share": 0.1}
    given = {"task": "t", "n": 100, "sparsity": 0.5, "mean_output_tokens": 9.0, "paired": counts}
    content = make_profile().model_dump(mode="json") | {"evaluation": [given | shares | row]}
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    if words is None:
        assert load_profile(path).evaluation[0].paired is not None
        return
    with pytest.raises(RlkvError) as error:
        load_profile(path)
    assert_one_line(error.value, str(path), "evaluation[0]", words)
