"""``python -m harness`` is ``assay``."""

import os
import sys

# Python has put the current folder first, where a user's json.py would be taken for Python's own.
if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.curdir):
    sys.path.append(sys.path.pop(0))

from harness.cli import main

main()
