"""Published results to measure again: each folder here is one paper, as data.

A folder holds ``recipe.toml`` (title, citation, files to fetch, and a spec in the usual grammar), ``claims.toml`` (the
figures the paper prints and which runs each one is about) and ``README.md``.

:mod:`papers.recipe` and :mod:`papers.claims` say what stands in the two files.
"""

from papers.claims import Claim
from papers.recipe import Paper, Source, folder, load, names, readme

__all__ = ["Claim", "Paper", "Source", "folder", "load", "names", "readme"]
