"""Which version of a value model could answer a request, by when it was published. Times are of one monotonic clock."""

import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Publication:
    """One version. tried: when a client first asked for it. sent, answered: of the attempt that made it active.

    A version that isn't published yet, or whose attempts were refused so far, has ``answered`` at infinity.
    """

    directory: Path
    tried: float
    sent: float
    answered: float = math.inf


@dataclass
class Versions:
    """Of one name, by number from 1 on."""

    name: str
    by_number: dict[int, Publication] = field(default_factory=dict)

    def started_with(self, directory: Path) -> None:
        self.by_number[1] = Publication(directory, -math.inf, -math.inf, -math.inf)

    @property
    def active(self) -> int:
        """The last one whose publication was answered."""
        return max(number for number, one in self.by_number.items() if one.answered < math.inf)

    def try_next(self, directory: Path, now: float) -> int:
        """A client asks for a further version; returns the number it must get."""
        number = self.active + 1
        earlier = self.by_number.get(number)
        self.by_number[number] = Publication(directory, earlier.tried if earlier else now, now)
        return number

    def published(self, number: int, now: float) -> None:
        self.by_number[number].answered = now

    def was_active(self, number: int, sent: float, answered: float) -> bool:
        """Whether this version may have been active at some time of a request."""
        version, successor = self.by_number.get(number), self.by_number.get(number + 1)
        if version is None or version.sent > answered:
            return False
        return successor is None or successor.answered >= sent

    def may_be_gone(self, number: int, answered: float) -> bool:
        """Whether a request for this version by number may be refused: two later ones displace it."""
        displacing = self.by_number.get(number + 2)
        return displacing is not None and displacing.tried <= answered


@dataclass
class Published:
    """All names."""

    names: dict[str, Versions]

    def __getitem__(self, name: str) -> Versions:
        return self.names[name]

    def directory(self, label: str) -> Path:
        """Of NAME@VERSION."""
        name, _, number = label.partition("@")
        return self.names[name].by_number[int(number)].directory
