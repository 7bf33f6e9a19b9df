"""Who imports what, read from the source: the seams of the design."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("pipeline", "data_prep")
    for path in sorted((ROOT / package).rglob("*.py"))
}
SEAMS = {
    "deepspeed": {"pipeline.engine"},
    "transformers": {"pipeline.models", "pipeline.evaluation.fine_tuning", "data_prep.tokenizer"},
    "webdataset": {"data_prep.shards"},
    "mpi4py": {"data_prep.ranks"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in names}
    return found


IMPORTS = {module: imports(path) for module, path in SOURCES.items()}


def modules_of(package: str) -> list[str]:
    return [module for module in SOURCES if module.split(".")[0] == package]


def test_the_sources_are_found() -> None:
    assert {"pipeline.train", "pipeline.relation_kl", "data_prep.build_shards"} <= SOURCES.keys()
    assert IMPORTS["pipeline.loop"] >= {"pipeline.run", "torch", "data_prep.command"}


@pytest.mark.parametrize("module", modules_of("pipeline"))
def test_pipeline_uses_what_data_prep_shares_and_no_more_of_it(
    module: str,
) -> None:
    used = {name for name in IMPORTS[module] if name.split(".")[0] == "data_prep"}
    allowed = {"shards", "block_cache", "command", "compiled", "config", "durable"}
    assert used <= {f"data_prep.{name}" for name in allowed}


@pytest.mark.parametrize("module", modules_of("data_prep"))
def test_data_prep_does_not_know_the_pipeline(module: str) -> None:
    assert "pipeline" not in {name.split(".")[0] for name in IMPORTS[module]}


@pytest.mark.parametrize("library", SEAMS)
def test_a_library_is_imported_in_its_seam_alone(library: str) -> None:
    users = {m for m, names in IMPORTS.items() if library in {n.split(".")[0] for n in names}}
    assert users == SEAMS[library]


def reads_of_environment(path: Path) -> set[str]:
    """Names that a file asks os.environ or os.getenv for."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript):
            asked, name = ast.unparse(node.value), node.slice
        elif isinstance(node, ast.Call) and node.args:
            asked, name = ast.unparse(node.func), node.args[0]
        else:
            continue
        if asked in ("os.environ", "os.environ.get", "os.getenv") and isinstance(
            name, ast.Constant
        ):
            found.add(name.value)
    return found


@pytest.mark.parametrize("module", modules_of("pipeline"))
def test_only_the_topology_asks_the_environment_for_ranks(module: str) -> None:
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR"}
    if module == "pipeline.topology":
        assert reads_of_environment(SOURCES[module]) & ranks
    else:
        assert not reads_of_environment(SOURCES[module]) & ranks


def test_no_module_imports_itself_in_a_circle() -> None:
    known = {
        module: {name for name in names if name in SOURCES} - {module}
        for module, names in IMPORTS.items()
    }
    assert list(graphlib.TopologicalSorter(known).static_order())
