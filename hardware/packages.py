"""Whether a runtime's packages are here, and how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence


def missing(modules: Sequence[str], extra: str, load: Callable[[], object]) -> str | None:
    """Why a runtime cannot be used, with the install line, or None.

    Parameters
    ----------
    modules : sequence of str
        Import names that must be there.
    extra : str
        The extra of ``assay-bench`` that brings them.
    load : callable
        Imports the runtime itself: a package may be installed and broken.
    """
    remedy = f'pip install "assay-bench[{extra}]"'
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: {remedy}"
    try:
        load()
    except (ImportError, OSError) as error:
        return (
            f"{extra} is installed but does not load ({type(error).__name__}: {error}); try {remedy} --force-reinstall"
        )
    return None
