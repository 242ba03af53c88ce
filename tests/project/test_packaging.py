"""The distribution: what is packaged, what a wheel holds, and the rules of imports between packages."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gda

from ..support.repository import ROOT, setup_cfg

NOT_PACKAGED = {"tests", "benchmarks", "docs", "examples", "build", "dist"}
REMOTE_CODE = ["configuration", "modeling_gda"]
BRIDGE = "configuration_gda.py"
# Dependencies point one way: configuration ← modeling_gda ← conversion ← training, eval beside training, and
# src/gda/commands on top. Every package may import src/gda/common, which imports none of them.
ABOVE_CONVERSION = {"training", "eval", "commands", "cli"}
MAY_NOT_IMPORT = {
    "configuration": {"modeling_gda", "conversion"} | ABOVE_CONVERSION,
    "modeling_gda": {"conversion"} | ABOVE_CONVERSION,
    "conversion": ABOVE_CONVERSION,
    "training": {"eval", "commands", "cli"},
    "eval": {"training", "commands", "cli"},
    "src/gda/common": {"configuration", "modeling_gda", "conversion"} | ABOVE_CONVERSION,
}


def package_folders() -> dict[str, Path]:
    """The folder of each package in setup.cfg, as setuptools finds it."""
    options = setup_cfg()["options"]
    roots = dict(line.split(" = ") for line in options["package_dir"].split("\n") if line)
    folders = {}
    for package in options["packages"].split():
        root = max((root for root in roots if f"{package}.".startswith(f"{root}.")), key=len)
        folders[package] = ROOT / roots[root] / package.removeprefix(root).strip(".").replace(".", "/")
    return folders


def repository_files() -> list[Path]:
    """Files of the working tree that are tracked or not ignored by git."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="lists the files of a git repository")


def imports(path: Path, *, for_types: bool = True) -> set[tuple[int, str]]:
    """(level, module) of every import in a file, such as (0, "gda.eval") and (1, "attention_gda").

    Without `for_types`, imports under `if TYPE_CHECKING:` are left out.
    """
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if for_types else walk_what_runs(tree):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, f"{node.module or ''}.{alias.name}".lstrip(".")) for alias in node.names}
    return found


def walk_what_runs(parent: ast.AST) -> Iterator[ast.AST]:
    """All parts of a file that run, including functions."""
    for node in ast.iter_child_nodes(parent):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from walk_what_runs(node)


def import_graph() -> dict[str, set[str]]:
    """By module of the package, the modules of the package that it imports, also in functions."""
    files = {
        package if path.stem == "__init__" else f"{package}.{path.stem}": path
        for package, folder in package_folders().items()
        for path in folder.glob("*.py")
    }
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        for level, name in imports(path, for_types=False):
            parents = package.split(".")
            full = ".".join([*parents[: len(parents) - level + 1], name]) if level else name
            # `from gda.eval import models` loads gda.eval.models, `from gda.eval.models import load` does too.
            graph[module] |= {found for found in (full, full.rpartition(".")[0]) if found in files}
    return graph


def imported_test_file(path: Path, level: int, module: str) -> Path | None:
    """The test file that an import in the file `path` loads; None if it loads none."""
    folder = path.parents[level - 1] if level else ROOT
    parts = module.split(".")
    paths = (folder.joinpath(*parts[:length]).with_suffix(".py") for length in range(1, len(parts) + 1))
    return next((found for found in paths if found.name.startswith("test_") and found.is_file()), None)


def test_every_folder_of_modules_is_a_package() -> None:
    """setup.cfg lists exactly the folders with modules; a wheel silently omits others."""
    folders = {
        path.parent
        for path in ROOT.rglob("*.py")
        if not any(part in NOT_PACKAGED or part.startswith(".") for part in path.relative_to(ROOT).parts)
        if path.parent != ROOT
    }
    listed = package_folders()
    assert len(set(listed.values())) == len(listed)
    assert set(listed.values()) == folders
    assert ROOT / "src" / "gda" in folders
    assert all(package == "gda" or package.startswith("gda.") for package in listed)


@needs_git
def test_version_is_defined_once() -> None:
    """In _version.py. setup.cfg reads it there, and metadata and citation agree."""
    assignment = re.compile(r"^\s*(?:__version__|version)\s*=\s*[\"']?\d", re.MULTILINE)
    holders = [path for path in repository_files() if path.suffix in {".py", ".cfg", ".toml"}]
    holders = [path.relative_to(ROOT).as_posix() for path in holders if assignment.search(path.read_text("utf-8"))]
    assert holders == ["src/gda/_version.py"]
    assert setup_cfg()["metadata"]["version"] == "attr: gda._version.__version__"
    assert importlib.metadata.version("grouped-differential-attention") == gda.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: *(\S+)$", citation, re.MULTILINE) == [gda.__version__]


@needs_git
def test_no_paths_of_a_developers_machine() -> None:
    machine = re.compile(rb"(?<![\w.])/(?:work|root|home/\w+)/")
    named = {
        path.relative_to(ROOT).as_posix(): match.group()
        for path in repository_files()
        if (match := machine.search(path.read_bytes()))
    }
    assert named == {}
    assert machine.search(b"see /" + b"root/venv")


def test_remote_code_is_flat_and_its_names_are_unique() -> None:
    """Saving copies both folders into one, where only the bridge is replaced."""
    assert [path.name for path in (ROOT / "modeling_gda").rglob("*.py") if path.parent.name != "modeling_gda"] == []
    names = Counter(path.name for folder in REMOTE_CODE for path in (ROOT / folder).glob("*.py"))
    assert {name for name, count in names.items() if count > 1} == {BRIDGE, "__init__.py"}
    tree = ast.parse((ROOT / "modeling_gda" / BRIDGE).read_text(encoding="utf-8"))
    statements = [ast.unparse(node) for node in tree.body]
    assert statements == ["from gda.configuration.configuration_gda import GDAConfig", "__all__ = ['GDAConfig']"]


@pytest.mark.parametrize("folder", REMOTE_CODE)
def test_remote_code_imports_only_what_transformers_has(folder: str) -> None:
    """Files saved with a checkpoint import each other relatively, and no library that transformers lacks."""
    known = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}
    relative_import = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)
    for path in (ROOT / folder).glob("*.py"):
        found = imports(path)
        assert {level for level, _ in found} <= {0, 1}, path.name
        roots = {module.split(".")[0] for level, module in found if level == 0}
        assert roots <= (known | {"gda"} if path.name in {BRIDGE, "__init__.py"} else known), path.name
        # transformers finds the files to copy by this expression, in docstrings too.
        neighbours = {module.split(".")[0] for level, module in found if level == 1}
        assert set(relative_import.findall(path.read_text(encoding="utf-8"))) == neighbours, path.name


@pytest.mark.parametrize("folder", MAY_NOT_IMPORT)
def test_dependencies_point_one_way(folder: str) -> None:
    """No package imports one that is built on it, not even in a function."""
    if not (ROOT / folder).is_dir():
        pytest.skip("not built yet")
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        modules = {module for level, module in imports(path) if level == 0}
        forbidden = {
            module for module in modules if module.startswith("gda.") and module.split(".")[1] in MAY_NOT_IMPORT[folder]
        }
        assert forbidden == set(), path.name


def test_no_import_cycles() -> None:
    graph = import_graph()
    assert graph["gda.conversion.sources.gguf"] >= {"gda.conversion.sources.source"}
    assert graph["gda.modeling_gda.modeling_gda"] >= {"gda.modeling_gda.attention_gda"}
    TopologicalSorter(graph).prepare()


def test_no_test_file_imports_another() -> None:
    """Shared code is in tests/support."""
    imported = {
        f"{path.relative_to(ROOT)}: {found.relative_to(ROOT)}"
        for path in (ROOT / "tests").rglob("*.py")
        for level, module in imports(path)
        if (found := imported_test_file(path, level, module)) is not None
    }
    assert imported == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel, built from an sdist of a copy of the tree, so that no stale files are included."""
    for module in ("build", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_has_every_module(wheel: zipfile.ZipFile) -> None:
    """The packages of setup.cfg with all modules, py.typed and templates, and no other files."""
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in package_folders().items()
        for path in folder.glob("*.py")
    }
    data = {
        f"gda/{path.relative_to(ROOT).as_posix()}"
        for pattern in (
            "*/templates/*",
            "*/*/templates/*",
            "eval/tasks/README.md",
            "eval/tasks/definitions/*.yaml",
            "training/configs/*.yaml",
        )
        for path in ROOT.glob(pattern)
        if path.parts[len(ROOT.parts)] != "src"
    } | {f"gda/common/templates/{path.name}" for path in ROOT.glob("src/gda/common/templates/*")}
    assert "gda/modeling_gda/attention_gda.py" in modules
    assert {"gda/eval/templates/report.html.jinja", "gda/training/configs/fsdp2.yaml"} <= data
    assert held == modules | data | {"gda/py.typed"}
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {gda.__version__}\n" in wheel.read(metadata).decode()


@pytest.mark.slow
def test_model_runs_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked outside the repository."""
    wheel.extractall(tmp_path)
    program = (
        "import torch, gda, gda.modeling_gda.attention_gda as home\n"
        "from transformers import AutoModelForCausalLM\n"
        "config = gda.GDAConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=2)\n"
        "logits = AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2]])).logits\n"
        "print(gda.__file__, home.__file__, tuple(logits.shape), sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    wanted = [str(tmp_path / "gda/__init__.py"), str(tmp_path / "gda/modeling_gda/attention_gda.py"), "(1, 2, 8)"]
    assert ran.stdout.splitlines() == wanted
