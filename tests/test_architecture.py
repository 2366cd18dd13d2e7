"""The shape of the code, read off its syntax trees: who may import whom, and what importing the command line loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.bundle import MODULES
from orchestrator.bundle_store import PACKER

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = {"trainer.errors", "trainer.protocol", "trainer.config"}  # standard library only
HEAVY = {"torch", "huggingface_hub", "mlflow", "optuna", "pandas", "rich", "plotly", "submitit", "scipy"}

# Which modules may import an outside library. Each library of the orchestrator has one; the trainer's are its own.
OWNERS = {
    "brotli": {"orchestrator.bundle"},
    # samplers, points and trials in its terms, what a sampler is shown, storage
    "optuna": {"orchestrator.search", "orchestrator.points", "orchestrator.memory", "orchestrator.search_view"},
    "cmaes": {"orchestrator.evolution"},
    "sqlalchemy": {"orchestrator.search_view"},  # comes with Optuna, to whose storage it is handed
    "numpy": {"orchestrator.evolution", "orchestrator.racing"},
    "submitit": {"orchestrator.launcher", "orchestrator.slurm_launcher"},  # its two executors
    "huggingface_hub": {"orchestrator.hub"},
    "httpx2": {"orchestrator.hub"},  # comes with it; its errors are this one's
    "mlflow": {"orchestrator.tracking"},
    "rich": {"orchestrator.progress"},
    "plotly": {"orchestrator.charts"},
    "pandas": {"orchestrator.tables"},
    "scipy": {"orchestrator.statistics"},
    "triton": {"trainer.kernels"},  # there on machines with a GPU only
}
TRAINER_LIBRARIES = {"torch", "numpy", "sentencepiece", "brotli", "constriction"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path for plane in ("orchestrator", "trainer") for path in sorted((ROOT / plane).glob("**/*.py"))
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: imports for annotations alone do not count."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imported_by(module: str) -> set[str]:
    """Full names of what a module imports, wherever in it; of our own packages, the modules."""
    found: set[str] = set()
    for node in nodes(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            origin = node.module or ""
            found |= {
                f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in SOURCES else origin for alias in node.names
            }
    return found


IMPORTS = {module: imported_by(module) for module in SOURCES}


def outside(module: str) -> set[str]:
    """Top-level names of the libraries that are neither ours nor Python's."""
    tops = {name.partition(".")[0] for name in IMPORTS[module]}
    return tops - {"orchestrator", "trainer"} - set(sys.stdlib_module_names)


def within(module: str, plane: str) -> set[str]:
    return {name for name in IMPORTS[module] if name == plane or name.startswith(f"{plane}.")}


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("trainer")])
def test_the_trainer_never_imports_the_orchestrator_or_its_libraries(module: str) -> None:
    assert not within(module, "orchestrator")
    assert outside(module) - TRAINER_LIBRARIES <= {library for library, owners in OWNERS.items() if module in owners}


def test_the_trainer_does_without_triton() -> None:
    without = "import sys; sys.modules['triton'] = None; import trainer.kernels as k; print(k.triton)"
    told = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told == "None\n"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("orchestrator")])
def test_the_orchestrator_takes_only_the_contract_from_the_trainer(module: str) -> None:
    assert within(module, "trainer") <= CONTRACT | {"trainer"}


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("orchestrator")])
def test_an_outside_library_is_imported_by_its_one_module(module: str) -> None:
    for library in outside(module):
        assert module in OWNERS.get(library, set()), f"{module} imports {library}"


@pytest.mark.parametrize("module", sorted(CONTRACT))
def test_the_contract_needs_the_standard_library_only(module: str) -> None:
    assert not outside(module)
    assert within(module, "trainer") <= CONTRACT


def test_a_bundled_module_imports_bundled_modules_only() -> None:
    bundled = {f"trainer.{name}" for name in MODULES}
    for module in bundled:
        assert within(module, "trainer") <= bundled, module


def test_the_trainers_package_is_empty() -> None:
    assert SOURCES["trainer"].read_text() == ""


def test_no_modules_import_each_other_in_a_circle() -> None:
    remaining = {
        module: {name for name in names if name in SOURCES and name != module} for module, names in IMPORTS.items()
    }
    while free := {module for module, names in remaining.items() if not names & set(remaining)}:
        remaining = {module: names for module, names in remaining.items() if module not in free}
    assert not remaining, f"in or behind a circle: {sorted(remaining)}"


def test_no_module_is_called_utils() -> None:
    assert not {name for name in SOURCES if name.rpartition(".")[2] in ("utils", "util", "helpers", "common", "misc")}


def test_files_of_the_contract_are_named_in_one_module() -> None:
    names = {
        "spec.json",
        "result.json",
        "events.jsonl",
        "job.json",
        "claim.json",
        "manifest.json",
        "artifact.bin",
        "recheck.json",
        "verify.json",
        "audit.json",
        "documents.txt",
    }
    for module, path in SOURCES.items():
        if module != "trainer.protocol":
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert not texts & names, module


def test_a_stored_bundle_is_known_by_all_that_packs_it() -> None:
    reached, left = set[str](), {"orchestrator.bundle"}
    while left:
        reached |= left
        left = {name for module in left for name in within(module, "orchestrator")} - reached
    packer = {f"orchestrator.{name}" for name in PACKER}
    assert reached - {"orchestrator", "orchestrator.errors"} == packer  # errors change no byte


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    listing = subprocess.run(
        [sys.executable, "-c", "import orchestrator.cli, sys; print(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert not HEAVY & {name.partition(".")[0] for name in listing.split()}
