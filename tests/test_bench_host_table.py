"""`make bench-host`: every place runs, and the report has a line for each."""

import itertools
import json
import sys

import pytest
import torch

from scripts import bench_common, bench_host_table
from tests.tiny import tiny_config
from train.data import Batch


@pytest.mark.slow
def test_every_form_is_timed_and_reported(monkeypatch, tmp_path, capsys):
    cfg = tiny_config("moe")
    generator = torch.Generator().manual_seed(0)

    def text():
        for _ in itertools.count():
            ids = torch.randint(0, cfg.vocab_size, (2, cfg.seq_len + 1), generator=generator)
            yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros_like(ids[:, 1:]))

    for name, value in (("tiny", lambda: cfg), ("BATCH", 2), ("VOCAB", cfg.vocab_size), ("STEPS", 2), ("text", text)):
        monkeypatch.setattr(bench_host_table, name, value)
    monkeypatch.setattr(bench_host_table, "keep_freed_memory", lambda: False)  # it would hold for the whole process
    monkeypatch.setattr(bench_common, "OUT", tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench_host_table", "--rounds", "2", "--rows", "400", "4000"])
    try:
        bench_host_table.main()
    finally:
        torch.set_num_threads(threads)
    records = json.loads((tmp_path / f"{bench_common.page('host_table', 1)}.json").read_text())
    assert [record["rows"] for record in records] == [400] * 7 + [4000] * 7
    assert len({record["name"] for record in records}) == 7
    assert all(record["ratio"] > 0 and record["milliseconds_in_calls"] > 0 for record in records)
    assert [record["mapped_mib"] > 0 for record in records[:7]] == [False, False, False, True, True, False, False]
    table = (tmp_path / f"{bench_common.page('host_table', 1)}.md").read_text()
    assert sum(line.startswith("| 4e+0") for line in table.splitlines()) == 14
