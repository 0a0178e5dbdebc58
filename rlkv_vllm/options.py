"""Options of a job: one pydantic schema for YAML file, `--set` and `run.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_text

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A group of options; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


def read_options(path: Path, hint: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: of the file.
        hint: what such a file is, for errors.

    Raises:
        RlkvError: there is no such file, or it holds no mapping.
    """
    import yaml

    if not path.exists():
        raise RlkvError(f"{one_line(path)}: no such file: give {hint}")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise RlkvError(f"{one_line(path)}: not valid YAML ({one_line(error)}): fix it") from error
    if not isinstance(content, dict):
        raise RlkvError(f"{one_line(path)}: holds no mapping: give `key: value` lines of {hint}")
    return content


def override(
    content: Mapping[str, Any], changes: Sequence[str], flag: str = "--set"
) -> dict[str, Any]:
    """Options with some of them changed.

    Args:
        content: nested options.
        changes: ``section.key=value``; values are YAML, as OmegaConf reads them.
        flag: what the user calls them, for errors.

    Raises:
        RlkvError: a change has no key or no value, goes through a value, or is no YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    result: dict[str, Any] = dict(content)
    for change in changes:
        key, equals, _ = change.partition("=")
        if not key or not equals:
            raise RlkvError(f"{flag} {one_line(change)}: give key=value, e.g. {flag} seed=1")
        place: Any = result
        for part in key.split(".")[:-1]:
            place = place.get(part, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise RlkvError(f"{flag} {one_line(change)}: {part} is no section of options")
        try:
            merged = OmegaConf.merge(OmegaConf.create(result), OmegaConf.from_dotlist([change]))
            result = OmegaConf.to_container(merged, resolve=False)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise RlkvError(f"{flag} {one_line(change)}: {one_line(error)}") from error
    return result


def validate(schema: type[SectionT], content: Mapping[str, Any], where: str, docs: str) -> SectionT:
    """Check options against their schema.

    Args:
        schema: of the options.
        content: the options.
        where: file or flag that they come from, for errors.
        docs: page that lists them.

    Raises:
        RlkvError: naming `where`, the key and what is allowed.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RlkvError(
            f"{where}: {key}: {first['msg']} (given {one_line(repr(first['input']), 60)}): "
            f"see {docs} for every option"
        ) from error
