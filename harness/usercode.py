"""The user's own code, written as ``module:name`` where a name is expected: the one place that finds and imports it.

The rule: a module is looked for as a file in the current folder first, then among what is installed. The current
folder stands last in ``sys.path``, so that a file beside a spec never replaces a module of Python, of an installed
package or of Assay. A file whose name is taken in this way (``methods.py``, ``json.py``) is loaded as
``assay_user.methods``; every other one under its own name, so that it is one and the same module for whoever else
imports it. Both names are found again in workers, where stored models name their classes by them.

While a user's module is imported it sees an empty command line and no input, and whatever it raises, an exit
included, is reported as the user's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import AssayError, InputError, explanation, suggestion
from harness.text import shown

PRIVATE = "assay_user"
"""The package of those modules in the current folder whose own names are taken."""

_TARGET = re.compile(r"[\w-]+(\.[\w-]+)*:[^\W\d]\w*")
_appended: set[str] = set()
_users: set[str] = set()
_SCRIPT = 'Put what only a script does under `if __name__ == "__main__":`.'


def find(target: str, kind: str = "task") -> Any:
    """The object that ``module:name`` stands for; nothing of it is called.

    Parameters
    ----------
    target : str
        ``"module:name"``; the module may have dots.
    kind : str
        What the name stands for in the spec, for messages: "task", "method", "hardware".

    Raises
    ------
    InputError
        If the module is not there or cannot be imported, or has no such name.
    """
    where = f"{kind} {shown(target)}"
    module_name, _, attribute = target.partition(":")
    if not _TARGET.fullmatch(target):
        raise InputError(f"{where}: what is your own is written module:name, with a module's name, not its path.")
    if module_name.partition(".")[0] == "__main__":
        raise InputError(
            f"{where}: workers cannot import what is defined in a notebook or in the running script. "
            "Move it into a file of its own, such as mine.py, and name it mine:NAME."
        )
    file = _file(module_name)
    if file is None and module_name.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(f"{where}: {module_name!r} is a module of Python itself, which has no {kind}.")
    with _as_in_a_script(), blamed(f"{where}: importing {module_name!r}", _SCRIPT):
        module = _import(module_name, file, where)
    if attribute not in vars(module):
        with blamed(f"{where}: reading {attribute!r}"):  # a module may have __getattr__
            if hasattr(module, attribute):
                return getattr(module, attribute)
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(f"{where}: module {module_name!r} has no {attribute!r}. {suggestion(attribute, names)}")
    return vars(module)[attribute]


def package(target: str) -> str:
    """The top-level package under which :func:`find` loads a target: what a stored model of it may name."""
    module_name = target.partition(":")[0]
    file = _file(module_name)
    with blamed(f"{shown(target)}: importing {module_name!r}", _SCRIPT):
        return PRIVATE if file is not None and _is_taken(module_name, file) else module_name.partition(".")[0]


def use_current_folder() -> None:
    """Let modules of the current folder be imported, behind all others.

    Called in every process that meets the user's code. Calling it again is harmless; after a change of the current
    folder it forgets the modules of the former one.
    """
    folder = _folder()
    if folder is None:
        return
    root = sys.modules.get(PRIVATE)
    changed = root is None or root.__path__ != [str(folder)]
    if changed:
        for name in [name for name in sys.modules if name in _users or name.partition(".")[0] == PRIVATE]:
            del sys.modules[name]
        _users.clear()
        sys.path[:] = [entry for entry in sys.path if entry not in _appended]
        _appended.clear()
    if not {"", str(folder)} & set(sys.path):
        sys.path.append(str(folder))
        _appended.add(str(folder))
    if not changed:
        return
    root = types.ModuleType(PRIVATE, "Modules of the current folder whose own names are taken.")
    root.__path__ = [str(folder)]
    root.__spec__ = importlib.machinery.ModuleSpec(PRIVATE, None, is_package=True)
    sys.modules[PRIVATE] = root


@contextlib.contextmanager
def blamed(action: str, remedy: str = "") -> Iterator[None]:
    """Report whatever the user's code raises as the user's.

    Parameters
    ----------
    action : str
        What was done, such as "task 'mine:make': calling it".
    remedy : str
        A sentence that follows where the code ended the program or waited for input.

    Raises
    ------
    InputError
        In place of any exception that is not Assay's own, ``SystemExit`` included. A Ctrl-C of the person at the
        keyboard passes through.
    """
    pressed: list[int] = []
    try:
        with _noting_interrupts(pressed):
            yield
    except AssayError:  # said by Assay, or by code that knows Assay: Unavailable, with the remedy
        raise
    except SystemExit as error:
        raise InputError(f"{action} ended the program (sys.exit({shown(error.code)})). {remedy}".rstrip()) from error
    except EOFError as error:
        raise InputError(f"{action} waits for input, and there is none. {remedy}".rstrip()) from error
    except KeyboardInterrupt as error:
        if pressed:
            raise
        raise InputError(f"{action} raised KeyboardInterrupt.") from error
    except BaseException as error:  # the user's code may raise anything
        raise InputError(f"{action} raised {explanation(error)}") from error


def _folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted under us
        return None


def _file(module: str) -> Path | None:
    """The file of a module in the current folder, or None."""
    folder = _folder()
    if folder is None or module.partition(".")[0] == PRIVATE:
        return None
    place = folder.joinpath(*module.split("."))
    for candidate in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if candidate.is_file():
            return candidate
    return None


def _import(name: str, file: Path | None, where: str) -> types.ModuleType:
    use_current_folder()
    importlib.invalidate_caches()  # the file may be younger than Python's listing of its folder
    before = set(sys.modules)
    try:
        return importlib.import_module(f"{PRIVATE}.{name}" if file is not None and _is_taken(name, file) else name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there; something that it imports is not
        raise InputError(
            f"{where}: there is no module {name!r}: neither {name.replace('.', '/')}.py in {_folder()} nor an "
            "installed one. Start assay in the folder of your file, or install its package."
        ) from None
    finally:
        _users.update(key for key in set(sys.modules) - before if _lies_in_folder(sys.modules[key]))


def _lies_in_folder(module: types.ModuleType) -> bool:
    file, folder = getattr(module, "__file__", None), _folder()
    if file is None or folder is None or {"site-packages", "dist-packages"} & set(Path(file).parts):
        return False
    return Path(file).is_relative_to(folder)


def _is_taken(name: str, file: Path) -> bool:
    """Whether the module's own name means another module than the file in the current folder."""
    use_current_folder()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # no package of that name, or a module without a spec
        return True
    return spec is None or spec.origin is None or not os.path.exists(spec.origin) or not file.samefile(spec.origin)  # noqa: PTH110


@contextlib.contextmanager
def _as_in_a_script() -> Iterator[None]:
    """An empty command line, no input, and what is printed on standard error: standard output is for results."""
    arguments, given = sys.argv, sys.stdin
    sys.argv = arguments[:1]
    try:
        with open(os.devnull, encoding="utf-8") as nothing, contextlib.redirect_stdout(sys.stderr):  # noqa: PTH123
            sys.stdin = nothing
            yield
    finally:
        sys.argv, sys.stdin = arguments, given


@contextlib.contextmanager
def _noting_interrupts(pressed: list[int]) -> Iterator[None]:
    """Note a Ctrl-C of the person at the keyboard, to tell it from a KeyboardInterrupt that the code raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or not Python's
        yield
        return

    def note(number: int, _: types.FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


use_current_folder()
