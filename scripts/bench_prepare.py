"""Time and memory of a preparation against the size of its input: `python -m scripts.bench_prepare --megabytes 500`.

Writes synthetic text (words of a Zipf law, a tenth of the documents near copies and 2 % exact copies) into four jsonl
files, prepares it in processes of its own, and samples the resident memory of all of them together: the sum of
proportional set sizes (PSS), which counts a shared page once. The table goes to benchmarks/results/.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from train.copies import batches, exact_copies, similar_groups
from train.document_store import DocumentIndex
from train.tasks import read_parts, write_locations

DOCUMENT_WORDS = 700  # mean length: about 4 kB, as web text has
VOCABULARY = 200_000
FILES = 4
NEAR, EXACT = 0.10, 0.02  # shares of documents that are copies of one of the last thousand of their file
PART, NUM_BANDS = 4096, 21  # documents of 4 kB in a part of 16 MiB; bands of a signature
OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
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
    """Peak of the PSS of a process and all below it, for each stage that it names on its error stream."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.peaks: dict[str, int] = {}
        self._stage = "start"
        self._process = process
        self._threads = [threading.Thread(target=target) for target in (self._sample, self._listen)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until the process has ended."""
        self._process.wait()
        for thread in self._threads:
            thread.join()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.startswith("preparing data: "):
                self._stage = line.removeprefix("preparing data: ").partition(":")[0].strip()

    def _sample(self) -> None:
        while self._process.poll() is None:
            total = 0
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._process.pid)
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_full_info().pss
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), total)
            time.sleep(INTERVAL)


def measure(folder: Path, files: list[str], num_workers: int) -> dict[str, float | int | str]:
    root = folder / "data"
    shutil.rmtree(root, ignore_errors=True)
    command = [
        sys.executable, "-m", "scripts.prepare_data", "data=datasets", f"data.data_files=[{','.join(files)}]",
        f"data.root={root}", f"data.num_workers={num_workers}",
    ]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    sampler = MemorySampler(process)
    sampler.wait()
    seconds = time.monotonic() - started
    if process.returncode != 0:
        raise SystemExit("the preparation failed")
    (manifest_path,) = root.glob("*/manifest.json")
    manifest = json.loads(manifest_path.read_text())
    source = manifest["provenance"]
    stages = ("reading documents", "hashing", "removing duplicates", "training the tokenizer", "tokenising train")
    return {
        "megabytes": round(source["bytes_read"] / 1e6),
        "documents": source["documents_read"],
        "near copies": source["near_duplicates"],
        "processes": num_workers,
        "seconds": round(seconds),
        **{f"MB while {stage}": round(sampler.peaks.get(stage, 0) / 1e6) for stage in stages},
    }


def write_hashes(folder: Path, count: int) -> None:
    """What hashing leaves of `count` documents of 4 kB, a tenth of which share bands with the one before."""
    rng = np.random.default_rng(0)
    parts = []
    for number, first in enumerate(range(0, count, PART)):
        size = min(PART, count - first)
        parts.append({"name": f"part-{number:05d}", "num_documents": size, "num_bytes": 4000 * size})
        bands = rng.integers(0, 2**64, (NUM_BANDS, size), dtype=np.uint64)
        alike = np.flatnonzero(rng.random(size) < NEAR)
        bands[: NUM_BANDS // 2, alike] = bands[: NUM_BANDS // 2, alike - 1]
        digests = rng.integers(0, 2**64, (size, 2), dtype=np.uint64)
        digests[alike[: len(alike) // 5]] = digests[alike[: len(alike) // 5] - 1]
        np.save(folder / f"part-{number:05d}.bands.npy", bands)
        np.save(folder / f"part-{number:05d}.digests.npy", digests)
        np.save(folder / f"part-{number:05d}.offsets.npy", np.arange(size + 1, dtype=np.int64) * 4000)
    (folder / "parts.json").write_text(json.dumps({"parts": parts}))


def sort_hashes(folder: Path) -> None:
    """The part of the search for copies that one process does, and the order of the documents."""
    index = DocumentIndex(folder, read_parts(folder))
    exact = exact_copies(index)
    documents, groups = similar_groups(index, NUM_BANDS, exact)
    order, bounds = batches(groups)
    np.save(folder / "groups.npy", groups[order])
    train = np.random.default_rng(0).permutation(np.flatnonzero(~exact))
    ends = np.cumsum(index.sizes(train))
    write_locations(folder / "locations", lambda a, b: index.locations(train[a:b]), len(train))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    record = {"documents": len(index), "sharing bands": len(documents), "batches": len(bounds) - 1, "GB": int(ends[-1])}
    print(json.dumps({**record, "MB": round(peak / 1e3)}))


def measure_sorting(folder: Path, count: int) -> dict[str, float | int | str]:
    write_hashes(folder, count)
    started = time.monotonic()
    command = [sys.executable, "-m", "scripts.bench_prepare", "--sort", str(folder)]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**row, "GB": round(row["GB"] / 1e9, 2), "seconds": round(time.monotonic() - started)}


def table(rows: list[dict[str, float | int | str]]) -> str:
    """Rows in Markdown."""
    columns = list(rows[0]) if rows else []
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = (f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(whole: list[dict[str, float | int | str]], sorting: list[dict[str, float | int | str]]) -> str:
    """The tables with what they were measured on."""
    return f"""# Preparation: time and memory against the size of the input

{time.strftime("%Y-%m-%d")}, {platform.machine()}, {len(os.sched_getaffinity(0))} core(s).
Load of the machine: {", ".join(f"{average:.1f}" for average in os.getloadavg())} (1, 5, 15 minutes).

Synthetic text in {FILES} jsonl files, documents of about {DOCUMENT_WORDS} words. Memory in MB is the peak of the sum of
the proportional set sizes of all processes, the command itself included, sampled every {INTERVAL} s in each stage.

{table(whole)}

What one process holds of all documents: places, sorting of digests and of {NUM_BANDS} bands, components, order of the
training text. Documents of 4 kB, a tenth of which share bands with the one before; peak of the resident memory.

{table(sorting)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--documents", type=int, nargs="+", default=[125_000, 500_000, 2_500_000])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where the text is written and prepared; default: a temporary one")
    parser.add_argument("--sort", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.sort is not None:
        sort_hashes(args.sort)
        return 0
    whole: list[dict[str, float | int | str]] = []
    sorting: list[dict[str, float | int | str]] = []

    def keep() -> None:
        (OUT / "prepare_cpu.md").write_text(report(whole, sorting))
        (OUT / "prepare_cpu.json").write_text(json.dumps({"whole": whole, "sorting": sorting}, indent=1))

    for count in args.documents:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            sorting.append(measure_sorting(Path(name), count))
            keep()
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            whole.append(measure(Path(name), write_text(Path(name), megabytes), args.workers))
            keep()
    print(report(whole, sorting))
    return 0


if __name__ == "__main__":
    sys.exit(main())
