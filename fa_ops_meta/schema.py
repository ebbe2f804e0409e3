"""The ops' arguments by name."""

from collections.abc import Mapping, Sequence
from typing import Any


def bind(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An op's arguments by name, those that were not given with their defaults."""
    arguments = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    positional = zip((argument.name for argument in arguments), args, strict=False)
    return {**defaults, **dict(positional), **(kwargs or {})}
