"""The report: self-contained, complete, escaped, and whole whatever is missing."""

import json
import math
import re
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from sweeps import figures, report, tables
from sweeps.report import build_report, main, read_conclusion
from sweeps.sweep_folder import MAX_CURVE_POINTS, read_sweep, thin
from tests.fake_sweep import FakeSweep, full_sweep


class Page(HTMLParser):
    """Collects what a browser would fetch, ids, figures and visible text."""

    def __init__(self, html):
        super().__init__()
        self.fetched, self.ids, self.figures, self.text, self.scripts = [], [], {}, [], 0
        self._figure, self._hidden = None, False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        for name in ("src", "data", "poster") + (("href",) if tag in ("link", "image", "use") else ()):
            self.fetched += [attrs[name]] if attrs.get(name) else []
        if tag in ("script", "style"):
            self._figure, self._hidden = attrs.get("data-for"), True
            self.scripts += tag == "script"

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._figure, self._hidden = None, False

    def handle_data(self, data):
        if self._figure:
            self.figures[self._figure] = json.loads(data)
        elif not self._hidden:
            self.text.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A complete sweep with one failure, its folder and page."""
    folder = full_sweep(tmp_path_factory.mktemp("sweep") / "tiny <b>sweep</b>").write()
    path = build_report(folder)
    return folder, Page(path.read_text(encoding="utf-8")), path


def test_files_are_written_and_nothing_else(full):
    folder, _, path = full
    names = {item.name for item in folder.iterdir()}
    assert names == {"plan.json", "results.csv", "trials", "report.html", "allocation.png", "fit.json"}
    assert path == folder / "report.html"
    record = json.loads((folder / "fit.json").read_text())
    assert record["verdict"] == "interior_minimum"
    assert abs(record["rho_star"]["estimate"] - 0.4) < 0.1
    assert read_conclusion(folder).startswith("The loss is lowest at rho = 0.")


def test_the_page_fetches_nothing(full):
    _, page, path = full
    html = path.read_text(encoding="utf-8")
    assert page.fetched == []
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html.split("<script")[0])
    assert "showSendToCloud: false" in html  # Plotly's share button would upload the figure
    assert 4e6 < len(html) < 8e6  # plotly.js is there, once


def test_conclusion_comes_first_and_sections_are_complete(full):
    _, page, _ = full
    wanted = ["conclusion", "curve", "arms", "controls", "training-curves", "expert-load", "memory-health", "failures"]
    positions = [page.ids.index(section) for section in [*wanted, "unseen", "provenance"]]
    assert positions == sorted(positions)
    text = " ".join(page.text)
    assert "58.7B tokens for 5.7B parameters" in text
    assert "0.21 tokens per parameter" in text
    assert "abc123" in text  # the corpus fingerprint
    assert "python -m sweeps.run action=run" in text
    assert "train.max_steps=400" in text
    assert ".venv/bin/python -m train.pretrain --config-path" in text
    assert "ValueError: <script>alert('no')</script> broke" in text  # the failed trial's log, as text


def test_text_is_escaped(full):
    _, page, path = full
    html = path.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "tiny <b>" not in html
    assert page.scripts == len(page.figures) + 2  # the figures' data, plotly.js and the page's own


def test_figures_are_valid_plotly_and_thin(full):
    _, page, _ = full
    assert len(page.figures) == 1 + 9
    for name, figure in page.figures.items():
        go.Figure(figure)  # raises on an unknown property
        for trace in figure["data"]:
            assert 0 < len(trace["x"]) == len(trace["y"]) <= MAX_CURVE_POINTS, name
    allocation = page.figures["allocation"]
    names = [trace["name"] for trace in allocation["data"]]
    assert sum("minimum 0." in name for name in names) == 4
    assert sum(name.startswith("control") for name in names) == 3


def test_curves_hold_the_recorded_numbers(full):
    folder, _, _ = full
    sweep = read_sweep(folder)
    trial = sweep.of_kind("arm")[0]
    trace = figures.train_loss(sweep)["data"][0]
    steps, losses = trial.series("train/loss")
    assert trace["x"] == steps == list(range(10, 401, 10))
    assert trace["y"] == pytest.approx(losses, rel=1e-5)
    counts = trial.last("moe/expert_counts")[0]
    bars = figures.final_load(sweep)["data"][0]["y"]
    assert bars == pytest.approx(sorted((c / (sum(counts) / len(counts)) for c in counts), reverse=True), abs=1e-4)


def test_arm_and_control_tables(full):
    sweep = read_sweep(full[0])
    points, controls = sweep.points()
    arms = tables.arm_table(sweep, report.fit_allocation(points, controls))
    assert [row[0] for row in arms.rows] == ["0", "0.1", "0.2", "0.3", "0.4", "0.6", "0.8", "1"]
    assert arms.rows[1][2] == "failed"
    assert all(len(row) == len(arms.head) for row in arms.rows)
    control = tables.control_table(sweep)
    assert len(control.rows) == 3 * (3 + 4)
    row = control.rows[0]
    assert float(row[-1]) == pytest.approx(float(row[-3]) - float(row[-2]), abs=2e-4)


def test_a_refusal_claims_no_minimum(tmp_path):
    sweep = FakeSweep(tmp_path / "rising", lambda rho: 4.1 + 0.1 * rho)
    for rho in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        for seed in (0, 1):
            sweep.add(rho, seed)
    page = Page(build_report(sweep.write()).read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert "No best rho is named: the loss rises" in text
    allocation = page.figures["allocation"]
    assert "shapes" not in allocation["layout"]
    forms = [trace for trace in allocation["data"] if "no minimum claimed" in trace["name"]]
    assert len(forms) == 4
    assert all(trace["visible"] == "legendonly" for trace in forms)
    assert "This sweep has no controls" in text


def test_missing_metrics_leave_words_instead_of_panels(tmp_path):
    sweep = FakeSweep(tmp_path / "bare")
    for rho in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        for seed in (0, 1):
            folder = sweep.add(rho, seed)
            for name in ("metrics.jsonl", "result.json", "status.json"):
                (folder / name).unlink()
    folder = sweep.write()
    (folder / "plan.json").unlink()
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert list(page.figures) == ["allocation"]
    assert text.count("Not recorded: no trial's metrics.jsonl holds") == 9
    assert "No trial has recorded its environment." in text


def test_damaged_metrics_are_survived(tmp_path):
    sweep = FakeSweep(tmp_path / "damaged")
    for rho in (0.0, 0.5, 1.0):
        folder = sweep.add(rho, 0)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 410, "train/loss": NaN}\n{"step": 420, "moe/expert_counts": [], "engram/gate')
        (folder / "status.json").write_text("{")
    page = Page(build_report(sweep.write()).read_text(encoding="utf-8"))
    values = [y for figure in page.figures.values() for trace in figure["data"] for y in trace["y"]]
    assert all(math.isfinite(value) for value in values)
    assert "3 values of rho finished" in " ".join(page.text)


def test_nothing_finished_still_gives_a_report(tmp_path):
    sweep = FakeSweep(tmp_path / "empty")
    sweep.fail(0.5, 0, "")
    folder = sweep.write()
    text = " ".join(Page(build_report(folder).read_text(encoding="utf-8")).text)
    assert report.NOTHING_FINISHED in text
    assert "loss is nan at step 121" in text
    assert "Its log.txt is absent or empty." in text
    assert read_conclusion(folder) == report.NOTHING_FINISHED


def test_rebuilding_gives_the_same_bytes(tmp_path):
    folder = full_sweep(tmp_path / "again", num_seeds=2).write()
    build_report(folder)
    first = [(folder / name).read_bytes() for name in ("report.html", "fit.json", "allocation.png")]
    build_report(folder)
    assert first == [(folder / name).read_bytes() for name in ("report.html", "fit.json", "allocation.png")]


def test_controls_meet_their_arm_at_the_solved_rho(tmp_path):
    sweep = FakeSweep(tmp_path / "solved")
    sweep.add(0.41, 0)
    sweep.add(0.41, 0, "one_row")
    sweep.rows[1]["rho_actual"] = 0.9  # a control's own share of what is left is another number
    points, controls = read_sweep(sweep.write()).points()
    assert points[0].rho == controls[0].rho == pytest.approx(25 / 60, abs=1e-6)


def test_command_line(tmp_path, capsys):
    folder = full_sweep(tmp_path / "cli", num_seeds=2).write()
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {folder / 'report.html'}"
    assert lines[0].startswith("The loss is lowest at rho = 0.")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "make sweep" in capsys.readouterr().err


def test_command_line_reports_the_folders_as_they_are(tmp_path, capsys):
    sweep = full_sweep(tmp_path / "grown", num_seeds=2)
    folder = sweep.write()
    before = len((folder / "results.csv").read_text().splitlines())
    late = sweep.add(0.5, 0)
    sweep.write()
    (folder / "results.csv").write_text("")  # stale, as after a runner that was killed
    assert main([str(folder)]) == 0
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == before + 1
    assert late.name in rows[-1]
    assert f"{sweep.rows[-1]['val_loss']:.6f}"[:7] in rows[-1]
    (late / "result.json").unlink()
    assert main([str(folder)]) == 0
    assert "finished" not in (folder / "results.csv").read_text().splitlines()[-1]
    (folder / "plan.json").unlink()
    assert main([str(folder)]) == 0  # results.csv alone will do
    capsys.readouterr()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("val_loss,", "loss,", "'val_loss' is missing"), ("finished", "finished,x", "is no number")],
)
def test_damaged_results_name_the_line(tmp_path, old, new, message):
    sweep = FakeSweep(tmp_path / "bad")
    sweep.add(1.0, 0)
    path = sweep.write() / "results.csv"
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"line 2: .*" + message):
        read_sweep(sweep.folder)


def test_thin_keeps_both_ends():
    steps, values = thin([(i, float(i)) for i in range(5000)])
    assert len(steps) == len(values) == MAX_CURVE_POINTS
    assert (steps[0], steps[-1]) == (0, 4999)
    assert steps == sorted(set(steps))
    assert thin([(1, 2.0)]) == ([1], [2.0])
