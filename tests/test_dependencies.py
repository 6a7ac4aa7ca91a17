"""What jaxscale imports is declared: the base install brings what training needs, an extra what its own parts need."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxscale"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_AN_EXTRA = {"supervisor/rpc.py": "supervise"}
"""Modules that import a package of an extra at their top: only a program of that extra imports them."""


ELSEWHERE = {"mlflow": ["mlflow-skinny"]}
"""Owners of names that the packages for tests do not bring."""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    """The names of requirements such as `jax[cuda13]>=0.12,<0.13`."""
    return {normal(re.match(r"[\w.-]+", text)[0]) for text in requirements}


def owners(top):
    """The packages that bring a top-level name."""
    return {normal(name) for name in installed().get(top, ELSEWHERE.get(top, [top]))}


@functools.cache
def installed():
    return packages_distributions()  # looks at every file of every package


BASE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(texts) for extra, texts in PROJECT["optional-dependencies"].items() if extra != "dev"}


class Imports(ast.NodeVisitor):
    """Collects (top-level name, whether it is imported inside a function). Imports for type checkers do not count."""

    def __init__(self):
        self.found: set[tuple[str, bool]] = set()
        self._depth = 0

    def visit_If(self, node):
        if getattr(node.test, "id", "") != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_FunctionDef(self, node):
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node):
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node):
        if node.level == 0:
            self._add(node.module)

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "attr", "") == "import_module" and isinstance(node.args[0], ast.Constant):
            self._add(node.args[0].value)

    def _add(self, module):
        top = module.partition(".")[0]
        if top != "jaxscale" and top not in sys.stdlib_module_names:
            self.found.add((top, self._depth > 0))


def imports_of(code):
    visitor = Imports()
    visitor.visit(ast.parse(code))
    return visitor.found


def undeclared(module, code):
    """What of a module's imports pyproject.toml does not promise to be there, one line each."""
    lines = []
    for top, is_lazy in sorted(imports_of(code)):
        allowed = BASE | EXTRAS.get(OF_AN_EXTRA.get(module, ""), set())
        if is_lazy:
            allowed = BASE.union(*EXTRAS.values())
        if not owners(top) & allowed:
            lines.append(f"{module} imports {top} {'in a function' if is_lazy else 'at its top'}")
    return lines


def test_every_import_is_declared():
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = {top for code in files.values() for top, _ in imports_of(code)}
    assert {"jax", "numpy", "orbax", "grain", "grpc", "pyarrow", "wandb"} <= found
    assert [line for module, code in files.items() for line in undeclared(module, code)] == []


@pytest.mark.parametrize(
    ("module", "code", "lines"),
    [
        ("a.py", "import jax.numpy as jnp\nimport os\nfrom orbax import checkpoint", []),
        ("a.py", "import optax", ["a.py imports optax at its top"]),
        ("a.py", "def f():\n  from psutil import Process", ["a.py imports psutil in a function"]),
        ("a.py", "import pyarrow", ["a.py imports pyarrow at its top"]),
        ("a.py", "async def f():\n  import pyarrow.parquet", []),
        ("a.py", "def f():\n  return importlib.import_module('psutil')", ["a.py imports psutil in a function"]),
        ("a.py", "if TYPE_CHECKING:\n  import psutil", []),
        ("a.py", "import grpc", ["a.py imports grpc at its top"]),
        ("supervisor/rpc.py", "import grpc", []),
    ],
)
def test_an_import_that_is_not_declared_is_found(module, code, lines):
    assert undeclared(module, code) == lines


ONLY_THE_BASE = """
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement

def install(wanted, extras=frozenset()):
    for text in requires(wanted) or []:
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            key = one.name.lower().replace("_", "-")
            if (key, frozenset(one.extras)) not in there:
                there.add((key, frozenset(one.extras)))
                try:
                    install(one.name, one.extras)
                except PackageNotFoundError:
                    pass

there = set()
for text in sys.argv[1].split():
    there.add((text, frozenset()))
    install(text)
known = {name for name, _ in there}
hidden = {
    top
    for top, owners in packages_distributions().items()
    if top != "jaxscale" and not any(owner.lower().replace("_", "-") in known for owner in owners)
}
assert {"grpc", "pyarrow", "pytest", "optax"} <= hidden, hidden
for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
    del sys.modules[name]

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
from jaxscale.cli import main
sys.exit(main(sys.argv[2:]))
"""
"""Hides every installed package but the ones named and what these need themselves, then runs a command."""


def test_training_needs_the_base_install_only(tmp_path):
    flags = ["--steps", "1", "--devices", "1", "--model.layers", "1", "--model.width", "32", "--model.heads", "2"]
    flags += ["--data.sequence", "32", "--data.held-out-documents", "1", "--evaluate.batches", "1"]
    flags += ["--run.dir", str(tmp_path / "run"), "--data.cache", str(tmp_path / "cache")]
    train = ["train", str(ROOT / "recipes" / "lm_nano.py"), *flags]
    generate = ["generate", str(tmp_path / "run"), "--prompt", "a", "--max-tokens", "2"]
    variables = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    for command in (train, generate):
        call = [sys.executable, "-c", ONLY_THE_BASE, " ".join(sorted(BASE)), *command]
        result = subprocess.run(call, capture_output=True, text=True, check=False, timeout=240, env=variables)
        assert result.returncode == 0, result.stderr
