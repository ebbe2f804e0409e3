"""python -m tests.families: compares our attention with eager's on tiny models of all of Transformers' families."""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from tests.families import building, running


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--part", default="1/1", help="N/M: every M-th family from the N-th on")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="where to write what became of every scenario")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    chosen = options.only.split(",") if options.only else building.families()[part - 1 :: parts]
    start, results = time.monotonic(), []
    for result in running.run(chosen, options.workers):
        results.append(result)
        print(f"{len(results)}/{len(chosen)} {result['family']}: {result['state']} ({result['seconds']} s) {result['reason'][:150]!r}", flush=True)
    print(Counter(result["state"] for result in results), f"{time.monotonic() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(sorted(results, key=lambda r: r["family"]), indent=1))
    return any(result["state"] in ("wrong", "crashed") for result in results)


if __name__ == "__main__":
    sys.exit(main())
