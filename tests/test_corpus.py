"""Sources of documents: what belongs to the embedded corpus, and every way a user's files can be wrong."""

import configparser
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from train.corpus import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    PACKAGES,
    is_written_text,
    pinned_versions,
    python_documents,
    python_identity,
)
from train.data_config import VAL_PACKAGES, DataConfig, DataSource
from train.external import check_utf8, external_units, unit_documents
from train.shards import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"def f():\n    return 1\n", True),
        ("Größe = '日本語' * 3\n".encode(), True),
        (b"", False),
        (b" \n\t\n", False),
        (b"a" * 80 + b"\0", False),
        (b"caf\xe9 is latin-1\n", False),
        (b"x = '" + b"QUJD" * (MAX_LINE_BYTES // 4) + b"'\n", False),
        (b"some words here\n" * (MAX_FILE_BYTES // 16 + 1), False),
        (b"0.123, 4.567, 8.901e-5,\n" * 50, False),
    ],
)
def test_written_text_is_told_from_data(text: bytes, expected: bool) -> None:
    assert is_written_text(text) is expected


def add_distribution(site: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
    recorded = [*files, f"{info.name}/METADATA", f"{info.name}/LICENSE.txt", "../../bin/tool.py"]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in recorded))
    (info / "LICENSE.txt").write_text("words of a licence\n")


@pytest.fixture
def fake_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    add_distribution(site, "zfake-one", "1.2", {
        "zfake/b.py": b"second = 'file'\n", "zfake/a.py": b"first = 'file'\n", "zfake/README.md": b"words\n",
        "zfake/tests/test_a.py": b"def test(): pass\n", "zfake/test_top.py": b"def test(): pass\n",
        "zfake/version.py": b"version = 'abc'\n", "zfake/a.pyc": b"\0\1", "zfake/data.json": b"{}",
        "zfake/empty.py": b"",
        "zsingle.py": b"module = 'alone'\n",
    })  # fmt: skip
    add_distribution(site, "zfake-unlisted", "9", {"zother/a.py": b"not = 'chosen'\n"})
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset())
    return site


def test_package_files_are_chosen_and_sorted(fake_site: Path) -> None:
    documents = list(python_documents(["zsingle"], packages=["zfake-one"]))
    assert [(d.name, d.text, d.held_out) for d in documents] == [
        ("zfake/README.md", b"words\n", False),
        ("zfake/a.py", b"first = 'file'\n", False),
        ("zfake/b.py", b"second = 'file'\n", False),
        ("zsingle.py", b"module = 'alone'\n", True),
    ]


def test_max_documents_takes_files_evenly(fake_site: Path) -> None:
    names = [d.name for d in python_documents([], max_documents=2, packages=["zfake-one"])]
    assert names == ["zfake/README.md", "zfake/b.py"]  # files 0 and 2 of 5, the empty one counted


def test_unknown_package_to_hold_out_is_named(fake_site: Path) -> None:
    with pytest.raises(DataError, match=r"data\.val_packages names nowhere, .* zfake, zsingle"):
        list(python_documents(["zfake", "nowhere"], packages=["zfake-one"]))


def test_standard_library_is_read_without_tests() -> None:
    names = [d.name for d in python_documents([], packages=[])]
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if re.search(r"(^|/)(test|tests|idle_test|site-packages)/", name)]
    assert not [name for name in names if name.startswith("_sysconfigdata")]
    groups = [name.partition("/")[0].partition(".")[0] for name in names]
    assert groups == sorted(groups)


def test_versions_must_be_the_pinned_ones(fake_site: Path, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\nzfake_one==1.2+cpu\nother==3\n")
    assert python_identity(["zfake-one"], constraints)["zfake-one"] == "1.2"
    constraints.write_text("zfake-one==1.3\nabsent==1\n")
    with pytest.raises(DataError, match=r"package zfake-one 1\.3, but 1\.2 is installed.*make setup"):
        python_identity(["zfake-one"], constraints)
    with pytest.raises(DataError, match=r"package absent 1, but none is installed"):
        python_identity(["absent"], constraints)
    with pytest.raises(DataError, match=r"package unpinned, which .* does not pin"):
        python_identity(["unpinned"], constraints)
    with pytest.raises(DataError, match=r"gone\.txt, which pins"):
        pinned_versions(tmp_path / "gone.txt")


def test_corpus_packages_are_pinned_and_come_with_the_core_installation() -> None:
    """Without any extra: walk the requirements of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].split("\n")
    core: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        if not requirement.strip() or "extra ==" in requirement:
            continue
        name = re.sub(r"[-_.]+", "-", re.match(r"\s*([\w.-]+)", requirement)[1]).lower()
        if name not in core:
            try:
                wanted += importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform
            core.add(name)
    chosen = {re.sub(r"[-_.]+", "-", name).lower() for name in PACKAGES}
    assert chosen <= core
    assert chosen <= set(pinned_versions())
    assert len(set(VAL_PACKAGES)) == len(VAL_PACKAGES) >= 5


def texts(**settings: object) -> list[tuple[str, bool | None]]:
    cfg = DataConfig(source=DataSource.datasets, **settings)
    documents = (document for unit in external_units(cfg) for document in unit_documents(cfg, unit))
    return [(d.text.decode(), d.held_out) for d in documents]


def write_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_are_documents_in_order(tmp_path: Path, name: str) -> None:
    rows = [{"body": f"row {i} é", "n": i} for i in range(300)]
    rows[7]["body"] = " \n"
    file = write_rows(tmp_path / name, rows)
    expected = [row["body"] for row in rows if row["body"].strip()]
    assert texts(data_files=[file], text_field="body") == [(text, None) for text in expected]
    assert texts(data_files=[file], text_field="body", max_documents=8) == [(text, None) for text in expected[:8]]


def test_text_files_are_one_document_each_unless_cut(tmp_path: Path) -> None:
    for name, text in (("b.txt", "line 1\nline 2\n\nline 3"), ("a.md", "# title"), ("c/d.txt", "deep")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    whole = [("# title", None), ("line 1\nline 2\n\nline 3", None), ("deep", None)]
    assert texts(data_files=[str(tmp_path)]) == whole
    assert texts(data_files=[str(tmp_path / "*.*"), str(tmp_path / "**" / "*.txt")]) == whole
    cut = texts(data_files=[str(tmp_path / "b.txt")], document_separator="\n\n")
    assert cut == [("line 1\nline 2", None), ("line 3", None)]
    assert texts(data_files=[str(tmp_path / "b.txt")], document_separator=r"\n\n") == cut  # as typed in a shell


def test_validation_files_are_held_out(tmp_path: Path) -> None:
    train, val = (write_rows(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in ("train", "val"))
    assert texts(data_files=[train], val_files=[val]) == [("train", False), ("val", True)]


def test_hub_dataset_is_streamed_from_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, **options: object) -> list[dict]:
        calls.append((path, options))
        return [{"text": f"of {options['split']}"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    got = texts(path="org/set", name="en", revision="abc", split="train[:9]", val_split="test")
    assert got == [("of train[:9]", False), ("of test", True)]
    assert calls[0] == ("org/set", {"streaming": True, "name": "en", "revision": "abc", "split": "train[:9]"})


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"dataset org/set, split train could not be opened.*network.*Couldn't reach"):
        texts(path="org/set")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"abc\0def", r"a\.txt has a NUL byte at byte 3: it is binary"),
        ("a.txt", "caf\u00e9".encode("utf-16"), r"a\.txt is UTF-16, not UTF-8; .*iconv -f utf-16"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 at byte 3 .*iconv"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl is not UTF-8 at byte 13"),
        ("a.txt", "cut é".encode()[:-1], r"a\.txt is not UTF-8 at byte 4"),
        ("a.csv", b"a,b", r"a\.csv must end in one of \.txt"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"data\.text_field=text is not a field .* it has body, id"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"data\.text_field=text must be text; row 1 .* has int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', r"row 1 of .*a\.jsonl has NoneType"),
        ("a.jsonl", b'{"text": "x"}\n{"te', r"a\.jsonl could not be read"),
        ("a.parquet", b"not parquet", r"a\.parquet could not be opened"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(data_files=[str(tmp_path / name)])


def test_missing_file_and_missing_setting_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.data_files=.*none\.txt is no file.*working directory"):
        texts(data_files=[str(tmp_path / "none.txt")])
    with pytest.raises(DataError, match=r"needs data\.path=.* or data\.data_files"):
        texts()


def test_characters_across_read_chunks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.external._CHECK_CHUNK", 5)
    file = tmp_path / "a.txt"
    file.write_text("aé日本語🎉" * 7, encoding="utf-8")
    check_utf8(file)
    good = file.read_bytes()
    file.write_bytes(good + b"ab\xff" + good)
    with pytest.raises(DataError, match=rf"at byte {len(good) + 2} "):
        check_utf8(file)


@pytest.mark.parametrize("separator", ["\n\n", "\n", "aba", "é"])
def test_documents_are_cut_alike_wherever_reading_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    file = tmp_path / "a.txt"
    text = "".join(np.random.default_rng(0).choice(list("ab\né"), 400))
    file.write_text(text, encoding="utf-8")
    expected = [part for part in text.split(separator) if part.strip()]
    for chunk in (1, 2, 3, 7, 10**6):
        monkeypatch.setattr("train.external._READ_CHUNK", chunk)
        got = texts(data_files=[str(file)], document_separator=separator)
        assert [text for text, _ in got] == expected and len(expected) > 2
