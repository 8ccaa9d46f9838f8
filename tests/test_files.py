"""Small files: all or nothing, and whatever is not whole is left out."""

import hashlib
import json
from pathlib import Path

import pytest

from train import files
from train.files import atomic_write, read_json, read_records, sha256, tail_lines, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for content in ("new", b"new"):
        with pytest.raises(OSError, match="No space"):
            atomic_write(path, content)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_comes_back_and_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_json(path, {"loss": 1.25, "name": "\u00e9"})
    assert read_json(path) == {"loss": 1.25, "name": "\u00e9"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"loss": 1.25, "name": "\u00e9"}


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1, 2]", b"\xff\xfe"])
def test_what_is_no_json_object_reads_as_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert read_json(path) is None
    assert read_json(tmp_path / "none") is None


def test_records_that_are_not_whole_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n7\n" + json.dumps({"step": 2}) + '\n{"step": 3')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    assert read_records(tmp_path / "none") == []


def test_tail_starts_where_told_and_survives_foreign_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"old\nnew \xff line\nlast\n")
    assert tail_lines(path, start=4) == ["new \ufffd line", "last"]
    assert tail_lines(path, num_bytes=5) == ["last"]
    assert tail_lines(tmp_path / "none") == []


def test_checksum_is_that_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
