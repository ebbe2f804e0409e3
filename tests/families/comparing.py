"""Compares our attention with eager's on one family, scenario by scenario, and says what became of each.

Floating-point error has one rule. A difference up to `ROUNDING` of the largest element passes. A larger one passes up
to `MARGIN` times the change of eager's own result when its weights change by rounding errors. Where that is more than
`CHAOS`, nothing can be compared. A difference that most draws of weights do not show was a tie, such as two experts or
two tokens that were as good.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fa_ops.integrations.huggingface import ATTENTION_NAME, register_triton_attention
from tests.families import sources
from tests.families.building import NotBuiltError, first_line, loaded_as_ours, tiny_model
from tests.families.inputs import Arguments, Inputs
from tests.families.scenarios import Results, Run, Scenario, forward, scenarios
from tests.families.shrinking import PAD

register_triton_attention()

ROUNDING = 1e-4
MARGIN = 30
CHAOS = 1e-2
WEIGHTS_CHANGE = 1e-7  # of each, relative: float32 rounds to 6e-8
DRAWS = 3
TELLING = 1e-2  # that the results move at least when attention's are spoilt

RIGHT, REFUSED, WRONG, CRASHED, NOT_APPLICABLE = "right", "refused", "wrong", "crashed", "not applicable"
REFUSALS = (NotImplementedError, ValueError, TypeError, RuntimeError)
NAMES = (ATTENTION_NAME, "fa_ops")
UNNAMED = "raised by us, but names neither fa_ops nor its implementation: "


@dataclass
class Outcome:
    """Of one scenario."""

    state: str
    reason: str = ""


@dataclass
class Report:
    """Of one family."""

    family: str
    state: str
    reason: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    model: str = ""
    calls: int = 0
    effect: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict:
        return asdict(self)


def distance(ours: Results, eager: Results) -> tuple[float, str]:
    """The largest difference as a share of the largest element of its tensor, and the tensor's name."""
    if ours.keys() != eager.keys():
        return float("inf"), f"results {sorted(ours)} for {sorted(eager)}"
    largest = max((float(t.detach().nan_to_num(0, 0, 0).abs().max()) for t in eager.values() if t.numel()), default=0.0)
    worst, where = 0.0, ""
    for name, expected in eager.items():
        actual = ours[name]
        if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
            return float("inf"), f"{name}: shape or NaN"
        finite = expected.isfinite()
        if not finite.any():
            continue
        size = max(float(expected[finite].abs().max()), 1e-2 * largest, 1e-30)
        if (share := float((actual[finite] - expected[finite]).abs().max()) / size) > worst:
            worst, where = share, name
    return worst, where


def outcome_of(scenario: Scenario, eager: PreTrainedModel, ours: PreTrainedModel) -> Outcome:
    try:
        expected = scenario.run(eager)
    except Exception as error:
        return Outcome(NOT_APPLICABLE, f"eager: {first_line(error)}")
    if not expected or all(not t.isfinite().any() for t in expected.values()):
        return Outcome(NOT_APPLICABLE, "eager: no finite result")
    try:
        actual = scenario.run(ours)
    except Exception as error:
        return failure(error)
    found, where = distance(actual, expected)
    if found <= ROUNDING:
        return Outcome(RIGHT)
    tolerance = max(ROUNDING, MARGIN * rounding_noise(scenario.run, eager, expected))
    if tolerance > CHAOS:
        return Outcome(NOT_APPLICABLE, f"eager: rounding errors of the weights change its results by {tolerance:.1e}")
    if found <= tolerance:
        return Outcome(RIGHT)
    for other in scenario.also:
        with contextlib.suppress(Exception):  # not every model takes every call
            if distance(actual, other(eager))[0] <= tolerance:
                return Outcome(RIGHT, "as documents that are told apart")
    with other_padding(eager):
        if distance(scenario.run(eager), expected)[0] > tolerance:
            return Outcome(NOT_APPLICABLE, "eager: what lies under the padding changes the results of tokens")
    return Outcome(WRONG, f"{where} differs by {found:.1e} of its size")


@contextlib.contextmanager
def other_padding(model: PreTrainedModel) -> Iterator[None]:
    """Padding that a model reads as something else, at the same positions."""

    def changed(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
        ids = arguments[0] if arguments else None
        if not isinstance(ids, torch.Tensor) or not isinstance(output, torch.Tensor) or ids.shape != output.shape[:-1]:
            return output
        return output.where((ids != PAD)[..., None], output.roll(1, -1))

    try:
        handle = model.get_input_embeddings().register_forward_hook(changed)
    except (AttributeError, NotImplementedError):  # no embeddings, and so no padding
        yield
        return
    try:
        yield
    finally:
        handle.remove()


def rounding_noise(run: Run, eager: PreTrainedModel, expected: Results) -> float:
    """How far eager's result moves when every weight changes by a few rounding errors."""
    weights = [p for p in eager.parameters() if p.is_floating_point()]
    kept = [w.detach().clone() for w in weights]
    noise = 0.0
    try:
        for seed in range(2):
            random = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for weight, value in zip(weights, kept, strict=True):
                    weight.copy_(value * (1 + WEIGHTS_CHANGE * torch.randn(value.shape, generator=random)))
            noise = max(noise, distance(run(eager), expected)[0])
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    return noise


def failure(error: Exception) -> Outcome:
    """A refusal names us; whatever else is raised where eager works is a crash."""
    if isinstance(error, REFUSALS) and any(name in str(error) for name in NAMES):
        return Outcome(REFUSED, str(error).strip())
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(last.filename.split("/")[-2:])
    is_ours = "/fa_ops" in last.filename and (last.line or "").startswith("raise")
    return Outcome(CRASHED, f"{UNNAMED if is_ours else ''}{first_line(error)} ({place}:{last.lineno})")


class Spy(TorchDispatchMode):
    """Counts calls of our op, and may spoil what it gives: not in size alone, which a norm behind it would take out."""

    def __init__(self, is_spoiling: bool) -> None:
        super().__init__()
        self.calls, self.is_spoiling = 0, is_spoiling

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace != "modelopt":
            return results
        self.calls += 1
        if not self.is_spoiling:
            return results
        if isinstance(results, torch.Tensor):
            return results + results.roll(1, -1)
        return type(results)((results[0] + results[0].roll(1, -1), *results[1:]))


def telling(model: PreTrainedModel, arguments: Arguments) -> tuple[int, float]:
    """How often a model calls our op, and how far its results move when the op's are spoilt."""
    with Spy(is_spoiling=False) as spy:
        results = forward(model, arguments)
    with Spy(is_spoiling=True):
        others = forward(model, arguments)
    return spy.calls, distance(others, results)[0]


@dataclass
class Pair:
    """One draw of a family: the models, and arguments that run with eager attention."""

    eager: PreTrainedModel
    inputs: Inputs
    arguments: Arguments
    seed: int
    ours: PreTrainedModel | None = None

    @classmethod
    def of(cls, family: str, seed: int = 0, source: Path | None = None) -> "Pair":
        config, given = None, None
        if source is not None:
            with contextlib.suppress(NotBuiltError):  # not every family has a tester
                config, given = sources.prepared(source, family, seed)
        eager = tiny_model(family, seed, config)
        inputs = Inputs(eager, seed)
        reasons: list[str] = []
        for arguments in inputs.candidates() if given is None else [given]:
            try:
                results = forward(eager, arguments)
            except Exception as error:
                reasons.append(first_line(error))
                continue
            if results and any(t.isfinite().any() for t in results.values()):
                return cls(eager, inputs, arguments, seed)
            reasons.append("eager gives no finite numbers")
        if missing := inputs.missing():
            raise NotBuiltError(f"no inputs: nothing is known of {', '.join(sorted(missing))}")
        raise NotBuiltError(f"no inputs: {reasons[0] if reasons else 'forward takes none that is known'}")

    def scenarios(self) -> dict[str, Scenario]:
        return {s.name: s for s in scenarios(self.eager, self.inputs, self.arguments)}


def examine(family: str, names: tuple[str, ...] | None = None, source: Path | None = None) -> Report:
    """All scenarios of a family, or those that are named; with Transformers' own testers where a source is given."""
    try:
        pair = Pair.of(family, source=source)
    except NotBuiltError as error:
        return Report(family, "not built", str(error))
    report = Report(family, "", model=type(pair.eager).__name__)
    try:
        pair.ours = loaded_as_ours(pair.eager)
    except Exception as error:
        loading = failure(error)
        report.outcomes["loading"] = loading
        return _concluded(report, pair)
    for name, scenario in pair.scenarios().items():
        if names is None or name in names:
            outcome = outcome_of(scenario, pair.eager, pair.ours)
            report.outcomes[name] = _confirmed(family, name, source) if outcome.state == WRONG else outcome
    if report.outcomes["no padding"].state == RIGHT:
        report.calls, report.effect = telling(pair.ours, pair.arguments)
    return _concluded(report, pair)


def _confirmed(family: str, name: str, source: Path | None) -> Outcome:
    """What most draws say."""
    outcomes = []
    for seed in range(DRAWS):
        pair = Pair.of(family, seed, source)
        outcomes.append(outcome_of(pair.scenarios()[name], pair.eager, loaded_as_ours(pair.eager)))
    state, count = Counter(outcome.state for outcome in outcomes).most_common(1)[0]
    outcome = next(outcome for outcome in outcomes if outcome.state == state)
    return Outcome(state, f"{outcome.reason} ({count} of {DRAWS} draws)") if count < DRAWS else outcome


def _concluded(report: Report, pair: Pair) -> Report:
    by_state: dict[str, list[str]] = {}
    for name, outcome in report.outcomes.items():
        by_state.setdefault(outcome.state, []).append(name)
    for state in (WRONG, CRASHED, REFUSED):
        if names := by_state.get(state):
            is_all = len(names) == len(report.outcomes) - len(by_state.get(NOT_APPLICABLE, []))
            report.state, report.reason = state, report.outcomes[names[0]].reason
            if not is_all:
                report.reason = f"{_listed(names)}: {report.reason}"
            break
    right = by_state.get(RIGHT, [])
    if report.state == REFUSED:
        if right:
            report.state = "right in part"
        elif not _uses_interface(pair.eager):
            report.state = "own attention"
    elif not report.state:
        if not right:
            report.state, report.reason = "not built", next(iter(report.outcomes.values())).reason
        elif report.calls and report.effect < TELLING:
            report.state, report.reason = "not built", f"attention changes its results by {report.effect:.1e} alone"
        elif report.calls:
            report.state = RIGHT
        else:
            report.state = "not called"
            report.reason = "attention of its own" if not _uses_interface(pair.eager) else ""
    return report


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _uses_interface(model: PreTrainedModel) -> bool:
    """Whether Transformers says so of the model and all models in it."""
    return all(m._can_set_attn_implementation() for m in model.modules() if isinstance(m, PreTrainedModel))
