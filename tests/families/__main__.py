"""Compares our attention with eager's on a tiny model of each family of Transformers, and writes the support matrix."""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from tests.families import building, running, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--part", default="1/1", help="N/M: every M-th family from the N-th on")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--transformers-source", type=Path, help="a checkout, for Transformers' own tiny models")
    parser.add_argument("--json", type=Path, help="where to write what became of every scenario")
    parser.add_argument("--write", action="store_true", help=f"write {table.PAGE.name}, which takes all families")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    chosen = options.only.split(",") if options.only else building.families()[part - 1 :: parts]
    if options.write and len(chosen) < len(building.families()):
        parser.error("--write takes all families: leave --only and --part out")
    start, results = time.monotonic(), []
    for result in running.run(chosen, options.workers, {"source": options.transformers_source}):
        results.append(result)
        line = f"{len(results)}/{len(chosen)} {result['family']}: {result['state']} ({result['seconds']} s)"
        print(f"{line} {table.reason_of(result)}", flush=True)
    print(f"\n{table.counts(results)}\n{time.monotonic() - start:.0f} s")
    if options.json:
        table.write_json(results, options.json)
    if options.write:
        table.write(results, building.versions())
    return 1 if Counter(result["state"] for result in results).keys() & {"wrong", "crashed"} else 0


if __name__ == "__main__":
    sys.exit(main())
