"""Time and memory of a preparation against the size of its input: `python -m scripts.bench_prepare --megabytes 500`.

Writes synthetic text (words of a Zipf law, a tenth of the documents near copies and 2 % exact copies) into four jsonl
files, prepares it in processes of its own, and samples the resident memory of all of them together: the sum of
proportional set sizes (PSS), which counts a shared page once. The table goes to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from scripts.bench_common import OUT, load

DOCUMENT_WORDS = 700  # mean length: about 4 kB, as web text has
VOCABULARY = 200_000
FILES = 4
NEAR, EXACT = 0.10, 0.02  # shares of documents that are copies of one of the last thousand of their file
INTERVAL = 0.5  # seconds between samples of memory


def write_text(folder: Path, megabytes: int, seed: int = 0) -> list[str]:
    """Files of `megabytes` in all, the same for the same seed."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, length)) for length in rng.integers(2, 12, VOCABULARY)], dtype=object)
    cumulated = np.cumsum(1.0 / (np.arange(VOCABULARY) + 10))
    cumulated /= cumulated[-1]
    names = []
    for number in range(FILES):
        path = folder / f"text-{number}.jsonl"
        names.append(str(path))
        recent: list[np.ndarray] = []
        with open(path, "w") as file:
            while file.tell() < megabytes * 10**6 / FILES:
                kind = rng.random()
                if recent and kind < NEAR + EXACT:
                    text = recent[rng.integers(len(recent))].copy()
                    if kind < NEAR:  # 1 % of its words are others
                        text[rng.integers(0, len(text), max(1, len(text) // 100))] = "changed"
                else:
                    length = max(20, int(rng.exponential(DOCUMENT_WORDS)))
                    text = words[np.searchsorted(cumulated, rng.random(length))]
                    recent = [*recent[-999:], text]
                file.write(json.dumps({"text": " ".join(text)}) + "\n")
    return names


class MemorySampler:
    """Peak of the PSS of a process and all below it, and of the largest single one."""

    def __init__(self, pid: int) -> None:
        self.peak = self.largest = self.processes = 0
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(INTERVAL):
            sizes = []
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                return
            for process in family:
                try:
                    sizes.append(process.memory_full_info().pss)
                except psutil.Error:
                    continue
            if sum(sizes) > self.peak:
                self.peak, self.largest, self.processes = sum(sizes), max(sizes), len(sizes)


def measure(folder: Path, files: list[str], num_workers: int) -> dict[str, float | int | str]:
    root = folder / "data"
    shutil.rmtree(root, ignore_errors=True)
    command = [
        sys.executable, "-m", "scripts.prepare_data", "data=datasets", f"data.data_files=[{','.join(files)}]",
        f"data.root={root}", f"data.num_workers={num_workers}",
    ]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    sampler = MemorySampler(process.pid)
    output, _ = process.communicate()
    seconds = time.monotonic() - started
    sampler.stop()
    if process.returncode != 0:
        raise SystemExit(f"preparation failed: {output}")
    (manifest_path,) = root.glob("*/manifest.json")
    manifest = json.loads(manifest_path.read_text())
    source = manifest["provenance"]
    return {
        "megabytes": round(source["bytes_read"] / 1e6),
        "documents": source["documents_read"],
        "near_copies": source["near_duplicates"],
        "workers": num_workers,
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(source["bytes_read"] / 1e6 / seconds, 2),
        "peak_mb_all_processes": round(sampler.peak / 1e6),
        "peak_mb_largest_process": round(sampler.largest / 1e6),
        "processes_at_peak": sampler.processes,
        "fingerprint": manifest["fingerprint"][:12],
    }


def report(rows: list[dict[str, float | int | str]]) -> str:
    """The table with what it was measured on."""
    columns = list(rows[0])
    lines = [
        "# Preparation: time and memory against the size of the input",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {len(os.sched_getaffinity(0))} core(s); synthetic text in "
        f"{FILES} jsonl files, documents of about {DOCUMENT_WORDS} words. Memory is the sum of the proportional set "
        f"sizes of all processes, sampled every {INTERVAL} s, the command itself (torch and all) included.",
        load(),
        "",
        f"| {' | '.join(name.replace('_', ' ') for name in columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for row in rows:
        cells = (f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--workers", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--folder", type=Path, help="where the text is written and prepared; default: a temporary one")
    args = parser.parse_args()
    rows = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            files = write_text(Path(name), megabytes)
            for num_workers in args.workers:
                rows.append(measure(Path(name), files, num_workers))
                (OUT / "prepare_cpu.md").write_text(report(rows))
                (OUT / "prepare_cpu.json").write_text(json.dumps(rows, indent=1))
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
