"""What a running sweep shows."""

import io
import itertools
import json
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.live import Progress, RemainingTime, SweepView, duration, label, read_progress
from sweeps.trial import trial_dir
from tests.test_runner import make_trial


def test_progress_of_every_state(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == Progress("waiting", 0, 0, None)
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 3, "max_steps": 9}))
    lines = [
        json.dumps({"step": 2, "train/loss": 5.5}),
        json.dumps({"step": 3, "val/loss": 1.0}),
        '{"step": 4, "train/l',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_progress(tmp_path) == Progress("running", 3, 9, 5.5)
    (tmp_path / "result.json").write_text(json.dumps({"val_loss": 4.5}))
    assert read_progress(tmp_path) == Progress("finished", 3, 9, 4.5)


def test_remaining_time_of_a_trial_and_what_it_teaches() -> None:
    now = [0.0]
    remaining = RemainingTime(clock=lambda: now[0])
    trial, other = make_trial(value=0.1, seconds=100.0), make_trial(value=0.2, seconds=100.0)
    assert remaining.of_trial(trial, Progress("running", 0, 50, None)) == 100.0
    remaining.of_trial(trial, Progress("running", 10, 50, None))  # resumed at step 10
    now[0] = 40.0
    assert remaining.of_trial(trial, Progress("running", 20, 50, None)) == pytest.approx(4.0 * 30)
    assert remaining.planned(other) == pytest.approx(4.0 * 50)  # 200 s for the whole trial, not 100


def test_remaining_time_of_the_sweep_against_all_schedules() -> None:
    """In-order list scheduling, against a direct simulation second by second."""
    remaining = RemainingTime()
    for running, waiting in itertools.product([[], [3.0], [3.0, 7.0]], [[], [5.0], [4.0, 4.0, 2.0, 9.0]]):
        places, queue, clock = list(running) + [0.0] * (2 - len(running)), list(waiting), 0
        while queue or any(places):
            for i, left in enumerate(places):
                if left == 0 and queue:
                    places[i] = queue.pop(0)
            places = [max(0.0, left - 1) for left in places]
            clock += 1
        assert remaining.of_sweep(running, waiting, 2) == clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1 h 30 min"), (9000, "2 h 30 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def view_of(tmp_path: Path, terminal: bool) -> tuple[SweepView, io.StringIO, list]:
    output = io.StringIO()
    trials = [make_trial(value=v / 100) for v in range(40)]
    folder = trial_dir(tmp_path, trials[1])
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 3, "max_steps": 9}))
    console = Console(file=output, force_terminal=terminal, width=100, height=60, color_system=None)
    return SweepView(tmp_path, trials, 2, console), output, trials


def test_table_in_a_terminal(tmp_path: Path) -> None:
    view, output, trials = view_of(tmp_path, terminal=True)
    with view:
        view.ended(trials[0], "failed")
        view.update([trials[1]], trials[2:])
    text = output.getvalue()
    assert "1 of 40 trials ended, 1 running" in text
    assert "3/9" in text
    assert text.index(label(trials[1])) < text.index(label(trials[0])) < text.index(label(trials[2]))
    assert "and 10 more" in text


def test_lines_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.live.LINE_SECONDS", 0.0)
    view, output, trials = view_of(tmp_path, terminal=False)
    with view:
        view.say("started [something]")
        view.update([trials[1]], trials[2:])
    first, second = output.getvalue().splitlines()
    assert first == "started [something]"
    assert second.startswith("0 of 40 trials ended, 1 running")
    assert second.endswith(f"{label(trials[1])} 3/9")
