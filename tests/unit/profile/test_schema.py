import json
import math

import jsonschema
import pytest
from pydantic import ValidationError

from rlkv_vllm.profile import HeadProfile, ModelFingerprint
from rlkv_vllm.profile.io import profile_text
from rlkv_vllm.profile.schema import json_schema_text
from tests.support import ROOT
from tests.support.profiles import make_profile

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
