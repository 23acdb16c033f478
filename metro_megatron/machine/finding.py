"""What was found of one thing."""

from dataclasses import dataclass
from typing import Literal

State = Literal["works", "absent", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the page, and what follows from it."""

    subject: str
    state: State
    found: str
    """Release, size or rate; of what does not work, why."""
    cost: str = ""
    """What a run pays as long as it is so."""
    remedy: str = ""
    """A command, or what else mends it."""
    is_needed: bool = False
    """Whether a run of the kind that was asked for cannot go on without."""

    @property
    def is_fatal(self) -> bool:
        return self.is_needed and self.state != "works"
