"""Sections of a benchmark: cases that fail alone, a budget of time, and a table that is written as it grows."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# One line of a table: {key of a column: number, text or None}; "error" in the place of numbers where a case failed.
Row = dict[str, Any]
# Characters of an error message that are kept.
MESSAGE = 160


class Case(NamedTuple):
    """One measurement. What it raises becomes its row."""

    name: str
    run: Callable[[], list[Row]]


class Column(NamedTuple):
    """How the value of `key` is printed: times `factor`, in the form `form`; texts as they are, None as a dash."""

    heading: str
    key: str
    factor: float = 1.0
    form: str = ".3g"

    def text(self, row: Row) -> str:
        """One cell."""
        value = row.get(self.key)
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value * self.factor, self.form)


@dataclass
class Section:
    """A table. The cases that found no time are in `skipped`, with the reason in the report."""

    key: str  # name in the JSON file and on the command line
    title: str
    note: str  # what is measured, and against what
    columns: list[Column]
    cases: list[Case]
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    reached: int = 0  # cases that ran, whether or not they failed
    seconds: float = 0.0

    def line(self, row: Row) -> str:
        """A row as one line of text; of a failed case, its name and why."""
        if "error" in row:
            return f"{row['case']}: {row['error']}"
        return "  ".join(f"{column.heading} {column.text(row)}" for column in self.columns)

    def markdown(self) -> str:
        """The table, failed cases and what was skipped."""
        lines = [f"## {self.title}", "", self.note, ""]
        lines.append("| " + " | ".join(column.heading for column in self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        for row in self.rows:
            cells = [row["case"], row["error"]] if "error" in row else [column.text(row) for column in self.columns]
            cells = [cell.replace("|", "\\|") for cell in cells]
            lines.append("| " + " | ".join(cells + [""] * (len(self.columns) - len(cells))) + " |")
        if self.skipped:
            lines += ["", f"Skipped, the time was over: {', '.join(self.skipped)}."]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {"title": self.title, "rows": self.rows, "skipped": self.skipped, "seconds": self.seconds}


def message(error: BaseException) -> str:
    """Type and first line of an error."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:MESSAGE]


def run_section(section: Section, deadline: float, after_case: Callable[[], None]) -> None:
    """Run the cases one after the other until `deadline` and print every row as it comes.

    Args:
        section: its rows and skipped cases are filled.
        deadline: in seconds of `time.monotonic`; a case that has begun is finished.
        after_case: called after every case, to free what it held and to write what there is.
    """
    start = time.monotonic()
    print(f"\n{section.title} ({len(section.cases)} cases)", flush=True)
    for case in section.cases:
        if time.monotonic() > deadline:
            section.skipped.append(case.name)
            continue
        try:
            rows = case.run()
        except Exception as error:  # out of memory, does not compile, not supported: told in its row
            rows = [{"case": case.name, "error": message(error)}]
        section.reached += 1
        for row in rows:
            section.rows.append(row)
            print(f"  {section.line(row)}", flush=True)
        after_case()
    section.seconds = time.monotonic() - start
    if section.skipped:
        print(f"  skipped, the time is over: {', '.join(section.skipped)}", flush=True)


def report(title: str, facts: Iterable[str], sections: Iterable[Section]) -> str:
    """The whole page."""
    head = f"# {title}\n\n" + "\n".join(facts) + "\n\n"
    return head + "\n".join(section.markdown() for section in sections)
