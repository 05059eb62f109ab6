"""What `concord doctor` finds: one line for each thing it has looked at."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    about: str
    found: str
    remedy: str = ""
    """What to do; empty where all is well."""
