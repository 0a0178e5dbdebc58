"""Imports of the package: no circle of files, and packages in one order from top to bottom.

Imports for types count: a reader follows them as he follows the others.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

import grimp
import networkx
import pytest

from tests.support import ROOT

(LAYERS,) = (
    contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    if contract["type"] == "layers"
)
#: Package -> its height; packages on one height do not import each other.
HEIGHT = {
    package.strip(): -place
    for place, layer in enumerate(LAYERS["layers"])
    for package in layer.split("|")
}


def imports_of_the_package() -> networkx.DiGraph:
    graph = grimp.build_graph("rlkv_vllm", exclude_type_checking_imports=False, cache_dir=None)
    return networkx.DiGraph(
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    )


@pytest.fixture(scope="module")
def imports() -> networkx.DiGraph:
    return imports_of_the_package()


def circles(imports: networkx.DiGraph) -> list[list[str]]:
    components = networkx.strongly_connected_components(imports)
    return sorted(sorted(component) for component in components if len(component) > 1)


def arrows_up(imports: networkx.DiGraph) -> Iterable[tuple[str, str]]:
    """Imports between packages that do not go down."""
    for importer, imported in sorted(imports.edges):
        if "." in importer and "." in imported:  # the package itself holds the public API
            above, below = importer.split(".")[1], imported.split(".")[1]
            if above != below and HEIGHT[above] <= HEIGHT[below]:
                yield importer, imported


def test_there_is_no_circle_of_files(imports: networkx.DiGraph) -> None:
    assert circles(imports) == []


def test_imports_go_down_only(imports: networkx.DiGraph) -> None:
    assert list(arrows_up(imports)) == []


def test_every_package_has_its_place() -> None:
    folder = ROOT / "rlkv_vllm"
    found = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    found |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert LAYERS["exhaustive"]
    assert found == set(HEIGHT)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("profile.io", "profile.lookup"), ("files", "profile.io"), ("serving.serve", "scorers.run")],
)
def test_a_wrong_import_is_found(imports: networkx.DiGraph, importer: str, imported: str) -> None:
    wrong = imports.copy()
    wrong.add_edge(f"rlkv_vllm.{importer}", f"rlkv_vllm.{imported}")
    assert circles(wrong) or list(arrows_up(wrong))
