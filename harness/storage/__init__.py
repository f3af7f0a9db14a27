"""Storage: compressed weights as one file that decodes bit for bit.

:mod:`harness.storage.container` is the interface; ``docs/container-format.md`` describes every byte.
"""

from __future__ import annotations

from harness.registry import Entry

TABLE: dict[str, Entry] = {
    "container": Entry(
        "harness.storage.container:Container",
        "sparse, shared and low-bit weights, entropy-coded (Han et al. 2016; Duda 2013)",
    ),
}
