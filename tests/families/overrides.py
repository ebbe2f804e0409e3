"""What the rules of `shrinking.py` cannot know, as data: fields of configurations by model type.

A value that can be called is called for each model.
"""

from typing import Any

CHANGES: dict[str, dict[str, Any]] = {}
