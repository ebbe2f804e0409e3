"""The support matrix as a page of the documentation: a family, its state, and the reason."""

import json
import re
import textwrap
from collections import Counter
from pathlib import Path

from tests.families.building import calls_interface, folder_of

PAGE = Path(__file__).parents[2] / "docs" / "transformers-families.md"
REASON_LENGTH = 200

# In the order in which the worst comes first.
STATES = {
    "wrong": "some result differs from eager attention's, and nothing says so",
    "crashed": "an error in the middle of a model that does not say that the implementation cannot do this",
    "refused": "an error by name where the model is loaded or first called",
    "own attention": "refused by name, because the family computes attention by itself",
    "right in part": "what is not refused by name equals eager attention",
    "right": "every result equals eager attention's",
    "not called": "every result equals eager attention's, but the model never calls this library",
    "not built": "no tiny model could be made here, so nothing is known",
}
ROW = re.compile(r"^\| `([^`]+)` \| ([a-z ]+) \|", re.MULTILINE)


def reason_of(result: dict) -> str:
    """Short enough for a table, with the scenarios that it is about."""
    reason = re.sub(r"\S*/site-packages/", "", " ".join(result["reason"].split())).replace("|", "\\|")
    return textwrap.shorten(reason, REASON_LENGTH, placeholder=" …")


def counts(results: list[dict]) -> str:
    """By model type, and by folder of Transformers, where the worst state of its model types counts."""
    order = list(STATES)
    worst: dict[str, str] = {}
    for result in results:
        folder = folder_of(result["family"])
        worst[folder] = min(worst.get(folder, "not built"), result["state"], key=order.index)
    calling = [state for folder, state in worst.items() if calls_interface(folder)]
    columns = [Counter(states) for states in ([r["state"] for r in results], worst.values(), calling)]
    rows = [
        f"| {state} | {' | '.join(str(column[state]) for column in columns)} | {meaning} |\n"
        for state, meaning in STATES.items()
    ]
    total = f"| all | {' | '.join(str(column.total()) for column in columns)} | |\n"
    titles = "| state | model types | folders | that call the interface | meaning |\n| --- | --: | --: | --: | --- |\n"
    return titles + "".join(rows) + total


def by_scenario(results: list[dict]) -> str:
    """How many model types each scenario has compared; what eager attention cannot run is not applicable."""
    states = ("right", "refused", "wrong", "crashed", "not applicable")
    scenarios: dict[str, Counter] = {}
    for result in results:
        for name, outcome in result.get("outcomes", {}).items():
            scenarios.setdefault(name, Counter())[outcome["state"]] += 1
    rows = [f"| {name} | {' | '.join(str(found[s]) for s in states)} |\n" for name, found in scenarios.items()]
    return f"| scenario | {' | '.join(states)} |\n| --- |{' --: |' * len(states)}\n" + "".join(rows)


def rendered(results: list[dict], versions: str) -> str:
    results = sorted(results, key=lambda result: result["family"])
    paragraphs = (
        "`make test-families` writes this page. It builds a tiny random model of each model type that an auto class of "
        'Transformers loads, saves it, loads it with `attn_implementation="modelopt_triton"`, and compares it with '
        f"eager attention in float32 on a CPU. Versions: {versions}.",
        "A padded batch counts where it has tokens. A difference passes that rounding errors explain; "
        "`tests/families/comparing.py` states the rule. A folder is a directory of `transformers/models`; its state is "
        "the worst of its model types. Some folders call Transformers' attention interface, others compute attention "
        "by themselves or have none.",
    )
    table = [f"| `{r['family']}` | {r['state']} | {reason_of(r)} |\n" for r in results]
    return (
        "# Families of Transformers\n\n"
        + "".join(f"{textwrap.fill(p, 120, break_on_hyphens=False, break_long_words=False)}\n\n" for p in paragraphs)
        + f"{counts(results)}\n{by_scenario(results)}"
        + "\n| model type | state | reason |\n| --- | --- | --- |\n"
        + "".join(table)
    )


def write(results: list[dict], versions: str) -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(rendered(results, versions))


def text() -> str:
    return PAGE.read_text() if PAGE.exists() else ""


def committed() -> dict[str, str]:
    """The state of each family on the page."""
    return dict(ROW.findall(text()))


def write_json(results: list[dict], path: Path) -> None:
    path.write_text(json.dumps(sorted(results, key=lambda result: result["family"]), indent=1))
