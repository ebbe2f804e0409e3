"""The rows that the benchmarks of models leave behind: written as they come, kept for --resume, and shown."""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from environment import describe, device_kind, version
from report import Row, cut_off, write_csv

CELL = ("task", "layout", "length", "batch", "compile")
SETTING = ("device", "card", "torch", "triton", "transformers", "commit")


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and tiny lengths, to see the script work")
    parser.add_argument("--resume", action="store_true", help="keep what the CSV has of this commit, card and "
                        "versions, and go on where the time limit ended it")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    parser.add_argument("--time-limit", type=float, default=270, help="seconds after which no further cell is begun")
    return parser.parse_args(arguments)


def record(
    name: str,
    options: argparse.Namespace,
    bench: Callable[[argparse.Namespace, list[Row]], Iterator[Row]],
    columns: Sequence[str],
    add_ratios: Callable[[list[Row]], None],
    markdown: Callable[[list[Row], Row], str],
) -> list[Row]:
    """Writes the rows of `bench` as they come, and their table at the end. `bench` is given the finished rows of an
    earlier run."""
    setting = describe(options.device) | {"transformers": version("transformers")}
    path = options.output / f"{name}-{'quick-' if options.quick else ''}{device_kind(options.device)}"
    options.output.mkdir(parents=True, exist_ok=True)
    done = finished_rows(path.with_suffix(".csv"), setting) if options.resume else []
    rows: list[Row] = []
    for row in bench(options, done):
        rows.append(setting | row)
        add_ratios(rows)
        write_csv(rows, path.with_suffix(".csv"), columns)  # each time: what a limit from outside ends can be resumed
    path.with_suffix(".md").write_text(markdown(rows, setting))
    print(path.with_suffix(".md").read_text())
    return rows


def finished_rows(path: Path, setting: Row) -> list[Row]:
    """The rows of an earlier run of the same commit, card and versions that the time limit had not cut off."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [
        row for row in rows if "skipped" not in row and all(row.get(name, "") == str(setting[name]) for name in SETTING)
    ]


class Agenda:
    """What of the planned rows is still to be measured: none of an earlier run's, none behind the time limit."""

    def __init__(self, options: argparse.Namespace, done: list[Row]) -> None:
        self.time_limit = options.time_limit
        self.deadline = time.monotonic() + options.time_limit
        self.known = {row_key(row): row for row in done}

    def settled(self, columns: Row) -> Row | None:
        """The row as it is without measuring it; None, and a line on stderr, for one to be measured."""
        if row_key(columns) in self.known:
            return self.known[row_key(columns)]
        if time.monotonic() > self.deadline:
            return columns | cut_off(self.time_limit)
        print(*columns.values(), file=sys.stderr, flush=True)
        return None


def row_key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in (*CELL, "impl"))


def heading(setting: Row) -> str:
    about = ("date", "card", "driver", "torch", "triton", "transformers", "commit")
    return ", ".join(f"{name} {setting[name]}" for name in about if setting[name])


def footnote(row: Row, reasons: list[str]) -> str:
    """The number, among the reasons, of why a row has no figure or is not to be believed."""
    why = row.get("error") or row.get("skipped")
    if not why:
        return ""
    if why not in reasons:
        reasons.append(why)
    return f"[{reasons.index(why) + 1}]"
