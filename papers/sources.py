"""The files a paper needs: found in ``ASSAY_DATA``, or downloaded, and always verified."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from harness.errors import DataError, StoreError, Unavailable
from harness.paths import data_folders
from harness.tasks.checkpoint import stored, verify
from papers import Paper, Source

Progress = Callable[[float, str], None]

_CHUNK = 1 << 16
_TIMEOUT_S = 30.0


def _silent(fraction: float, message: str) -> None:
    """Progress that nobody watches."""


def fetch(paper: Paper, progress: Progress = _silent) -> dict[str, Path]:
    """Bring every source file of a paper to ``$ASSAY_HOME/downloads/<sha256>``.

    Each is looked for in the folders of ``ASSAY_DATA`` (``<folder>/<filename>``, then ``<folder>/<key>/<filename>``),
    then in the downloads of earlier runs, then downloaded.

    Parameters
    ----------
    paper : Paper
        Whose sources.
    progress : callable
        ``progress(fraction, message)``.

    Returns
    -------
    dict of str to Path
        The verified file of each source, by source name.

    Raises
    ------
    DataError
        If a file found or downloaded is not the expected one.
    Unavailable
        If a file is not here and cannot be downloaded.
    StoreError
        If the disk refuses it.
    """
    return {source.name: _fetch(source, paper.key, progress) for source in paper.sources}


def local_copy(source: Source, key: str) -> Path | None:
    """The first file of that name in ``ASSAY_DATA``, verified; None where there is none.

    Raises
    ------
    DataError
        If the file has another content.
    """
    for folder in data_folders():
        for path in (folder / source.filename, folder / key / source.filename):
            if path.is_file():
                verify(path, source.sha256, f"Replace it by {source.url} or take its folder out of ASSAY_DATA.")
                return path
    return None


def _fetch(source: Source, key: str, progress: Progress) -> Path:
    target = stored(source.sha256)
    found = local_copy(source, key)
    if target.is_file():
        verify(target, source.sha256, "Delete it; it will be fetched again.")
        return target
    partial = target.with_name(f"{source.sha256}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if found:
            shutil.copyfile(found, partial)
        else:
            _download(source, partial, progress)
        verify(partial, source.sha256, f"Fetch {source.url} another way and put it into a folder named in ASSAY_DATA.")
        partial.replace(target)
    except OSError as error:
        raise StoreError(f"{target.parent}: {source.filename} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # a disk that refuses to delete has been reported by now
            partial.unlink(missing_ok=True)
    progress(1.0, source.filename)
    return target


def _download(source: Source, path: Path, progress: Progress) -> None:
    """Write the body of ``source.url`` to ``path``; a body cut short raises DataError, no connection Unavailable."""
    if not source.url.startswith(("https://", "http://")):
        raise Unavailable(f"{source.filename}: {source.url} is not a web address")
    try:
        response = urllib.request.urlopen(source.url, timeout=_TIMEOUT_S)  # noqa: S310 (scheme checked above)
    except (urllib.error.URLError, TimeoutError, http.client.HTTPException) as error:
        raise _unreachable(source, error) from error
    with response, path.open("wb") as stream:
        length = int(response.headers.get("Content-Length") or 0)
        received = 0
        while chunk := _read(response, source):
            stream.write(chunk)
            received += len(chunk)
            progress(received / length if length else 0.0, f"{source.filename}: {received} bytes")
        stream.flush()
        os.fsync(stream.fileno())
    if received < length:
        raise DataError(
            f"{source.url}: truncated: {length} bytes announced, {received} received. Try again, or put "
            f"{source.filename} into a folder named in ASSAY_DATA."
        )


def _read(response: http.client.HTTPResponse, source: Source) -> bytes:
    """One chunk; the network's errors, and not the disk's, become Unavailable."""
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(source, error) from error


def _unreachable(source: Source, error: Exception) -> Unavailable:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return Unavailable(
        f"{source.filename} is not in ASSAY_DATA and {source.url} cannot be fetched ({reason}); "
        "put the file into a folder named in ASSAY_DATA"
    )
