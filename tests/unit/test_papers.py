"""Papers: recipes as data, files fetched and verified."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import papers
from harness.errors import DataError, InputError, StoreError, Unavailable, UnknownName
from harness.spec import Spec
from papers import Paper, Source, sources

KEY = "neuron-merging-2020"
BODY = bytes(range(256)) * 1000
SHA = hashlib.sha256(BODY).hexdigest()


# ---- recipes ----


def test_the_recipe_is_a_valid_spec_of_nine_cells() -> None:
    paper = papers.load(KEY)
    cells = Spec.from_mapping(paper.specs[0]).cells()
    assert len(cells) == 9
    assert {cell.hardware["name"] for cell in cells} == {"torch"}
    assert cells[0].task["weights"] == paper.sources[0].sha256


def test_a_variant_changes_the_spec_and_drops_the_claims_that_are_not_about_it() -> None:
    paper = papers.load(KEY, ["criterion=l2"])
    assert paper.specs[0]["method"][1]["criterion"] == "l2"
    assert {claim.id: claim.claimed for claim in paper.claims if claim.claimed is not None} == {"baseline": 89.80}
    assert "l2/merge/0.7" in {claim.id for claim in paper.claims}
    assert len([claim for claim in papers.load(KEY).claims if claim.claimed is not None]) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["criterion=l3"], "criterion=l3 is not allowed. .*l1"),
        (["criteron=l2"], "Did you mean 'criterion'"),
        (["l2"], "NAME=VALUE"),
        ({"seed": 1}, "no setting 'seed'"),
    ],
)
def test_bad_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        papers.load(KEY, settings)


def test_an_unknown_paper_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'neuron-merging-2020'"):
        papers.load("neuron-merging")


# ---- files ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ASSAY_DATA", raising=False)
    return tmp_path / "home"


def paper(url: str = "http://127.0.0.1:9/weights.bin", sha256: str = SHA) -> Paper:
    source = Source(name="weights", filename="weights.bin", url=url, sha256=sha256)
    return Paper(key="some-paper", title="", cite="", sources=(source,), specs=(), claims=())


@contextlib.contextmanager
def server(body: bytes, *, announced: int | None = None, status: int = 200) -> Iterator[str]:
    """A web server for one file; it may announce more bytes than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if announced is None else announced))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/weights.bin"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def left_behind(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "downloads").iterdir()) if (home / "downloads").exists() else []


@pytest.mark.parametrize("place", ["weights.bin", "some-paper/weights.bin"])
def test_a_file_in_assay_data_is_used(place: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "data" / place
    target.parent.mkdir(parents=True)
    target.write_bytes(BODY)
    monkeypatch.setenv("ASSAY_DATA", f"{tmp_path / 'absent'}:{tmp_path / 'data'}")
    assert sources.fetch(paper()) == {"weights": home / "downloads" / SHA}
    assert (home / "downloads" / SHA).read_bytes() == BODY
    assert left_behind(home) == [SHA]


@pytest.mark.parametrize("body", [BODY[:-1], b""], ids=["truncated", "empty"])
def test_a_wrong_file_in_assay_data_is_named(
    body: bytes, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.bin").write_bytes(body)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        sources.fetch(paper())
    for part in (str(tmp_path / "weights.bin"), SHA, hashlib.sha256(body).hexdigest(), f"{len(body)} bytes", "Replace"):
        assert part in str(caught.value)
    assert left_behind(home) == []


def test_a_download_is_verified_kept_and_not_repeated(home: Path) -> None:
    said: list[tuple[float, str]] = []
    with server(BODY) as url:
        path = sources.fetch(paper(url), lambda fraction, text: said.append((fraction, text)))["weights"]
    assert path.read_bytes() == BODY
    assert said[-1] == (1.0, "weights.bin")
    assert [fraction for fraction, _ in said] == sorted(fraction for fraction, _ in said)
    assert len(said) > 2
    assert sources.fetch(paper(url))["weights"] == path  # the server is gone
    assert left_behind(home) == [SHA]


def test_a_damaged_earlier_download_is_named(home: Path) -> None:
    (home / "downloads").mkdir(parents=True)
    (home / "downloads" / SHA).write_bytes(BODY[:100])
    with pytest.raises(DataError, match="Delete it"):
        sources.fetch(paper())


def test_a_download_cut_short_leaves_nothing(home: Path) -> None:
    with server(BODY[:1000], announced=len(BODY)) as url, pytest.raises((DataError, Unavailable)) as caught:
        sources.fetch(paper(url))
    assert "weights.bin" in str(caught.value)
    assert left_behind(home) == []


def test_a_download_of_another_file_leaves_nothing(home: Path) -> None:
    with server(b"<html>sign in</html>") as url, pytest.raises(DataError, match="not the expected file") as caught:
        sources.fetch(paper(url))
    assert "ASSAY_DATA" in str(caught.value)
    assert left_behind(home) == []


def test_offline_is_a_reason_with_the_remedy(home: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/weights.bin"
    with pytest.raises(Unavailable, match="put the file into a folder named in ASSAY_DATA"):
        sources.fetch(paper(url))
    with server(b"gone", status=404) as url, pytest.raises(Unavailable, match="Not Found"):
        sources.fetch(paper(url))
    with pytest.raises(Unavailable, match="not a web address"):
        sources.fetch(paper("file:///etc/hostname"))
    assert left_behind(home) == []


def test_a_home_that_cannot_be_written_is_named(home: Path) -> None:
    home.write_text("a file where the folder should be")
    with server(BODY) as url, pytest.raises(StoreError, match=r"weights.bin cannot be written"):
        sources.fetch(paper(url))
