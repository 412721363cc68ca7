"""The package as a whole: a quiet import, documented public names, rooms that import downward."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gna_flex

ROOT = Path(gna_flex.__file__).parent
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py"))

# From the description of a mask up to the front door; everything else (reports, pictures, commands) is above it.
ROOMS = [
    "words",
    "torch_private",
    "kernels",
    "literal",
    "intervals",
    "neighborhood",
    "tiling",
    "mask_mod",
    "plan",
    "blocks",
    "reference",
    "reference_backward",
    "routing",
    "direct",
    "transforms",
    "flex",
    "mask",
    "flex_backward",
    "ops",
    "attention",
]
OPTIONAL = ("matplotlib", "skimage", "diffusers", "transformers", "triton", "natten", "cuda", "rich", "torch._inductor")
INTEGRATIONS = [name for name in MODULES if name.startswith("integrations.")]
HEAVY = (
    "matplotlib",
    "skimage",
    "diffusers",
    "transformers",
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "natten",
    "cuda.",
    "gna_flex.cuda",
    "gna_flex.cli",
    "gna_flex.dynamo",
)

IMPORT = f"""
import sys
import torch
import torch.utils.flop_counter  # imports Triton where that is installed
of_torch = set(sys.modules)  # newer versions import cuda.bindings themselves
import gna_flex
added = set(sys.modules) - of_torch
heavy = [name for name in added if name.startswith({HEAVY!r})]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""


def test_import_is_quiet_and_light(tmp_path):
    """No GPU, no compiler, no optional dependency; nothing printed; CUDA not initialised."""
    environment = {
        "PATH": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "error::DeprecationWarning:gna_flex",
    }
    for name in ("HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV"):
        environment |= {name: os.environ[name]} if name in os.environ else {}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_public_names_exist_and_are_documented():
    assert gna_flex.__all__ == sorted(gna_flex.__all__)
    for name in gna_flex.__all__:
        value = getattr(gna_flex, name)
        if name != "__version__":
            assert inspect.getdoc(value), name
            assert not name.startswith("_")


@pytest.mark.parametrize(
    "name", ["GNA", "gna_mask", "flex_attention", "explain", "backend", "permute", "unpermute", "compile_report"]
)
def test_the_names_of_the_tutorials_are_public(name):
    assert name in gna_flex.__all__


def path_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_documented_and_short(module):
    source = path_of(module).read_text()
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
    assert len(source.splitlines()) < 500, f"{module} is too long"


def test_reference_is_short():
    assert len((ROOT / "reference.py").read_text().splitlines()) < 80


def test_is_typed():
    assert (ROOT / "py.typed").is_file()


def test_version():
    assert [part.isdigit() for part in gna_flex.__version__.split(".")[:3]] == [True] * 3


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports when it is imported; type checking does not count."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gna_flex":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            names = [name.partition(".")[2] for name in names if name]
            found.update(known for name in names for known in (name, f"{name}.__init__") if known in MODULES)
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("gna_flex."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path_of(module).read_text()))
    return found - {"__init__"}


@pytest.mark.parametrize("module", [name for name in ROOMS if name in MODULES])
def test_rooms_import_downward(module):
    below = ROOMS[: ROOMS.index(module)]
    assert imports(module) <= set(below), f"{module} imports upward: {sorted(imports(module) - set(below))}"


def test_there_are_no_circles():
    graph = {module: imports(module) - {module} for module in MODULES if module != "__init__"}
    while graph:
        free = [module for module, needed in graph.items() if not needed & set(graph)]
        assert free, f"modules import each other: {sorted(graph)}"
        for module in free:
            del graph[module]


@pytest.mark.parametrize("module", ["__init__", *ROOMS, *INTEGRATIONS])
def test_optional_packages_are_imported_where_they_are_used(module):
    assert module in MODULES
    tree = ast.parse(path_of(module).read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith(OPTIONAL)]
