"""Wanted figures beside seen ones."""

from dataclasses import asdict, dataclass
from typing import Any

from .figures import Table


@dataclass(frozen=True)
class Goal:
    """One figure that was asked for.

    Attributes:
        place: where it was seen: ranks, nodes, fabric.
        what: the figure.
        wanted: its limit.
        at_most: whether more is worse.
        unit: of both numbers.
        seen: None: it could not be measured, or was never reached.
        note: which of several it is.
        never: it was measured and not once reached.
    """

    place: str
    what: str
    wanted: float
    at_most: bool
    unit: str
    seen: float | None
    note: str = ""
    never: bool = False

    @property
    def outcome(self) -> str:
        """In a word or two."""
        if self.seen is None:
            return "missed" if self.never else "not measured"
        reached = self.seen <= self.wanted if self.at_most else self.seen >= self.wanted
        return "reached" if reached else "missed"

    @property
    def limit(self) -> str:
        """What was wanted, in words."""
        return f"at {'most' if self.at_most else 'least'} {self._with_unit(self.wanted)}"

    @property
    def sight(self) -> str:
        """What was seen, in words."""
        if self.seen is None:
            return "never" if self.never else ""
        return self._with_unit(self.seen)

    def _with_unit(self, value: float) -> str:
        # Digits enough to tell a figure that is missed from its limit.
        number = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
        return f"{number} {self.unit}".rstrip()

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return (
            f"    {self.what}: wanted {self.limit}, seen {self.sight or 'nothing'}{note}: "
            f"{self.outcome}"
        )


class Goals:
    """Collects goals; prints each at once.

    Args:
        out: prints.
    """

    def __init__(self, out: Table) -> None:
        self.goals: list[Goal] = []
        self._out = out

    def add(self, goal: Goal) -> None:
        """One more."""
        self.goals.append(goal)
        self._out.say(str(goal))

    def markdown(self) -> None:
        """All of them, as a table for a document."""
        if not self.goals:
            return
        self._out.say("\n| where | what | wanted | seen | |\n|---|---|---|---|---|")
        for goal in self.goals:
            note = f" ({goal.note})" if goal.note else ""
            cells = (goal.place, goal.what, goal.limit, goal.sight + note, goal.outcome)
            self._out.say(f"| {' | '.join(cells)} |")

    def as_list(self) -> list[dict[str, Any]]:
        """Plain numbers, for JSON."""
        return [asdict(goal) | {"outcome": goal.outcome} for goal in self.goals]
