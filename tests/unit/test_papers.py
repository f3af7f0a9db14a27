"""Papers: recipes as data, files fetched and verified, claims judged."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import papers
from harness.errors import DataError, InputError, StoreError, Unavailable, UnknownName
from harness.spec import Spec
from papers import Claim, Paper, Source, sources, verdicts

KEY = "neuron-merging-2020"
BODY = bytes(range(256)) * 1000
SHA = hashlib.sha256(BODY).hexdigest()


# ---- recipes ----


def test_the_recipe_is_a_valid_spec_of_nine_cells() -> None:
    paper = papers.load(KEY)
    cells = Spec.from_mapping(paper.spec).cells()
    assert len(cells) == 9
    assert {cell.hardware["name"] for cell in cells} == {"torch"}
    assert cells[0].task["weights"] == paper.sources[0].sha256


@pytest.mark.parametrize("key", papers.names())
def test_every_claim_selects_cells_of_its_recipe(key: str) -> None:
    paper = papers.load(key)
    assert len({claim.id for claim in paper.claims}) == len(paper.claims)
    assert paper.cite.startswith("@")
    assert papers.readme(key).startswith("# ")
    for variant in ({}, *({name: value} for name, values in paper.variants.items() for value in values)):
        chosen = papers.load(key, variant)
        rows = [
            {**cell.row(), "chain": json.dumps(cell.chain), "run_id": str(index)}
            for index, cell in enumerate(Spec.from_mapping(chosen.spec).cells())
        ]
        for claim in chosen.claims:
            assert sum(verdicts.matches(claim.select, row) for row in rows) == 1, claim.id


def test_a_variant_changes_the_spec_and_drops_the_claims_that_are_not_about_it() -> None:
    paper = papers.load(KEY, ["criterion=l2-norm"])
    assert paper.spec["method"][1]["criterion"] == "l2-norm"
    assert {claim.id: claim.claimed for claim in paper.claims if claim.claimed is not None} == {"baseline": 89.80}
    assert "l2-norm/merge/0.7" in {claim.id for claim in paper.claims}
    assert len([claim for claim in papers.load(KEY).claims if claim.claimed is not None]) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["criterion=l3"], "criterion=l3 is not allowed. .*l1-norm"),
        (["criteron=l2-norm"], "Did you mean 'criterion'"),
        (["l2-norm"], "NAME=VALUE"),
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
    return Paper(key="some-paper", title="", cite="", sources=(source,), spec={}, claims=())


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


# ---- verdicts ----


def claim(**given: Any) -> Claim:
    values: dict[str, Any] = {"id": "a", "claimed": 88.40, "tolerance": 0.01, "select": {"task": "t"}}
    return Claim(**{**values, **given})


def row(accuracy: float | None = 0.884, **given: Any) -> Mapping[str, Any]:
    return {"run_id": "r", "task": "t", "status": "ok", "reason": None, "accuracy": accuracy, **given}


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        (0.8840, "reproduced"),
        (0.8841, "reproduced"),
        (0.8839, "reproduced"),
        (0.88411, "not reproduced"),
        (0.8838, "not reproduced"),
    ],
)
def test_the_tolerance_is_in_points_and_includes_its_ends(accuracy: float, verdict: str) -> None:
    (found,) = verdicts.judge([claim()], [row(accuracy)])
    assert (found.verdict, found.measured) == (verdict, pytest.approx(100 * accuracy))


def test_a_stand_in_is_never_a_verdict_on_the_papers_figure() -> None:
    for accuracy in (0.884, 0.1):
        (found,) = verdicts.judge([claim(stand_in=True)], [row(accuracy)])
        assert found.verdict == "stand-in"
        assert found.measured == pytest.approx(100 * accuracy)


def test_a_measurement_without_a_claim_has_no_verdict() -> None:
    (found,) = verdicts.judge([claim(claimed=None)], [row(0.5)])
    assert (found.claimed, found.measured, found.verdict) == (None, 50.0, None)


def test_seeds_are_averaged() -> None:
    (found,) = verdicts.judge([claim()], [row(0.88, run_id="1"), row(0.888, run_id="2"), row(0.1, task="other")])
    assert found.measured == pytest.approx(88.4)
    assert found.run_ids == ("1", "2")


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([], "not run (no run matches)"),
        ([row(None, status="failed", reason="out of memory")], "not run (failed: out of memory)"),
        ([row(), row(None, status="timeout", reason="60 s")], "not run (timeout: 60 s)"),
        ([row(None)], "not run (accuracy was not measured)"),
    ],
)
def test_what_was_not_measured_is_not_judged(rows: list[Mapping[str, Any]], verdict: str) -> None:
    for judged in (claim(), claim(stand_in=True), claim(claimed=None)):
        (found,) = verdicts.judge([judged], rows)
        assert (found.verdict, found.measured) == (verdict, None)


def test_nothing_runs_without_the_source() -> None:
    (found,) = verdicts.judge([claim()], [], not_run="offline")
    assert found.verdict == "not run (offline)"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([{"name": "p", "ratio": 0.5}], True),
        ([{"name": "p", "ratio": 0.6}], False),
        ([{"name": "p", "merge": False}], True),
        ([{"name": "p", "merge": True}], False),
        ([{"name": "p", "merge": 0}], False),
        ([{"name": "p", "absent": 1}], False),
        ([{"name": "p"}, {"name": "q"}], False),
        ([], False),
    ],
)
def test_a_chain_is_selected_by_the_given_parameters(wanted: list[dict[str, Any]], expected: bool) -> None:
    steps = [{"name": "p", "ratio": 0.5, "merge": False}]
    for chain in (steps, json.dumps(steps)):
        assert verdicts.matches({"chain": wanted}, row(chain=chain)) is expected


def test_the_report_has_the_stated_shape() -> None:
    made = papers.load(KEY)
    report = verdicts.report(made, verdicts.judge(made.claims, []))
    assert set(report) == {"paper", "claims"}
    assert report["paper"] == KEY
    for entry in json.loads(json.dumps(report))["claims"]:
        assert list(entry) == ["id", "claimed", "measured", "tolerance", "verdict", "run_ids"]
