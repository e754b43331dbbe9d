"""Whether something was made with the same settings as now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_json(content: Any) -> Any:
    """As JSON gives it back: a tuple is a list, a path is text."""
    return json.loads(json.dumps(content, default=str))


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that both have, with other values, in the order of `now`; what was read from JSON equals what it was."""
    return [key for key, value in as_json(dict(now)).items() if key in then and then[key] != value]
