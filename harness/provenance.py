"""What code and which packages made a number: source hashes, versions, the git commit."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_OURS = ("harness", "methods", "hardware", "results", "papers")
# Interfaces, names, messages and values that are hashed themselves: what is asked, not how it is computed.
_NOT_CODE = {
    "harness",
    "harness.cli",
    "harness.contracts",
    "harness.errors",
    "harness.executor",
    "harness.files",
    "harness.jobs",
    "harness.paths",
    "harness.registry",
    "harness.runner",
    "harness.spec",
    "harness.tasks",
    "harness.tasks.models",
    "harness.tasks.recipes",
    "harness.text",
    "harness.usercode",
    "harness.worker",
}


@functools.cache
def source_hash(*modules: str) -> str:
    """Sha256 of modules and of all first-party modules that they import, however indirectly.

    The syntax tree is hashed without docstrings and comments, so that wording does not make a result stale.
    A module that cannot be found (it is not Python source) counts by its name.
    """
    seen: dict[str, str] = {}
    waiting = list(modules)
    roots = {name.partition(".")[0] for name in modules} | set(_OURS)
    # A user's own module counts with all of the user's modules that it imports, wherever they lie beside it.
    own = any(root not in _OURS for root in roots)
    while waiting:
        name = waiting.pop()
        if name in seen or name in _NOT_CODE:
            continue
        path = _source(name)
        if path is None:
            if name in modules:
                seen[name] = "no source"
            continue
        tree = ast.parse(path.read_bytes())
        waiting += [
            found
            for found in _imports(tree, _package(name, path))
            if found.partition(".")[0] in roots or (own and _is_users(found))
        ]
        seen[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
    return hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest()


def _is_users(module: str) -> bool:
    """Whether a module is neither installed nor of the standard library."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        return False
    path = _source(module)
    return path is not None and not {"site-packages", "dist-packages"} & set(path.parts)


def _source(module: str) -> Path | None:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin and found.origin.endswith(".py") else None


def _package(module: str, path: Path) -> str:
    """The package that a module's relative imports start from."""
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def _imports(tree: ast.Module, package: str) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            # "from package import module": the name may itself be a module.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
            and isinstance(node.body[0].value.value, str)
        ):
            del node.body[0]
    return tree


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Installed versions of the distributions that are installed."""
    found = {}
    for name in sorted(set(distributions)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that Assay runs from; (None, None) where it is not one."""
    folder = Path(__file__).resolve().parent
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        # An install inside somebody else's repository must not be recorded as Assay's commit.
        if Path(top) != folder.parent:
            return None, None
        return _git(folder, "rev-parse", "HEAD"), bool(_git(folder, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],  # noqa: S607  git is found through PATH on purpose
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return done.stdout.strip()
