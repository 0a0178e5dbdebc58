"""Options of a job: one pydantic schema for YAML file, `--set` and `run.yaml`."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_text, write_text_atomic

#: The options of a job in its folder.
RUN_FILE = "run.yaml"
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
#: Packages that decide the result of a job.
_PACKAGES = ("rlkv-vllm", "torch", "transformers", "trl", "accelerate")


class Section(BaseModel):
    """A group of options; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML with Python's numbers: `1e-2` is one; `1:2` and dates are text. No key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's, which takes the last of equal keys."""
        places: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                name, line = self.construct_object(key), key.start_mark.line + 1
                if name in places:
                    raise yaml.YAMLError(
                        f"key {one_line(name, 60)} is given twice, in lines {places[name]} and "
                        f"{line}: keep one of them"
                    )
                places[name] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back alike."""


_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+)$")
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in known if tag.endswith((":bool", ":null", ":merge"))
        ]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


def read_options(path: Path, hint: str) -> dict[str, Any]:
    """The mapping in a YAML file; `hint` says in errors what such a file is.

    Raises:
        RlkvError: there is no such file, or it holds no mapping.
    """
    if not path.exists():
        raise RlkvError(f"{one_line(path)}: no such file: give {hint}")
    text = read_text(path)
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RlkvError(f"{one_line(path)}: not valid YAML ({one_line(error)}): fix it") from error
    if not isinstance(content, dict):
        raise RlkvError(f"{one_line(path)}: holds no mapping: give `key: value` lines of {hint}")
    return content


def override(
    content: Mapping[str, Any], changes: Sequence[str], flag: str = "--set"
) -> dict[str, Any]:
    """Nested options with some of them changed by ``section.key=value``.

    Values are YAML: ``lr=1e-2``, ``sparsities=[.4,.5]``.

    Raises:
        RlkvError: a change has no key or no value, goes through a value, or is no YAML.
    """
    result = dict(content)
    for change in changes:
        shown = f"{flag} {one_line(change)}"
        key, equals, text = change.partition("=")
        *sections, last = key.split(".")
        if not equals or not last:
            raise RlkvError(f"{shown}: give key=value, e.g. {flag} seed=1")
        place = result
        for section in sections:
            inner = place.get(section)
            if not isinstance(inner, dict | None):
                raise RlkvError(f"{shown}: {one_line(section)} is no section of options")
            place[section] = place = dict(inner or {})
        try:
            place[last] = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RlkvError(f"{shown}: value is not YAML ({one_line(error)})") from error
    return result


def validate(schema: type[SectionT], content: Mapping[str, Any], where: str, docs: str) -> SectionT:
    """Check options against their schema.

    Raises:
        RlkvError: naming `where` (file or flag), the key, what is allowed, and the `docs`.
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


def save_options(options: Section, path: Path) -> None:
    """Write the options of a job as YAML, with its command and the versions of packages."""
    versions = ", ".join(f"{name} {version}" for name, version in job_versions().items())
    header = (
        f"# Written by: {shlex.join(['rlkv', *sys.argv[1:]])}\n# Versions: {versions}\n"
        "# The options as used.\n"
    )
    content = options.model_dump(mode="json")
    body = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    write_text_atomic(path, header + body)


def job_versions() -> dict[str, str]:
    """Versions of the installed packages that decide the result of a job, by name."""
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}
