"""What was read, and what became of it: for the page that a run begins with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from slidetune.runtime.data.reading import Fault
from slidetune.units import format_count

# Of faults that are kept and shown.
_SHOWN = 10
_FIELDS = 6


@dataclass(slots=True, kw_only=True)
class Report:
    """Counts of rows, but where tokens are named."""

    source: str
    seq_len: int
    rows: int = 0
    """All, those that can't be used included."""
    conventions: Counter[str] = field(default_factory=Counter)
    """Rows that follow each."""
    unused_fields: Counter[str] = field(default_factory=Counter)
    """Rows that have each field that nothing looks at."""
    faulty: int = 0
    faults: list[Fault] = field(default_factory=list)
    """The first ones."""
    truncated: int = 0
    """Whose end was cut off."""
    cut: int = 0
    """Cut into pieces, all kept."""
    dropped: int = 0
    """Of which nothing is left to learn."""
    held_out: int = 0
    """Pieces."""
    pieces: int = 0
    """That are trained on."""
    tokens: int = 0
    """Of an epoch."""
    learned: int = 0
    """Tokens of an epoch that have a loss."""
    sequences: int = 0
    packed: bool = True

    def fault(self, fault: Fault) -> None:
        """Count a fault, and keep it if it is among the first."""
        self.faulty += 1
        if len(self.faults) < _SHOWN:
            self.faults.append(fault)

    def fault_lines(self) -> list[str]:
        """The first faults with their places, and how many more there are."""
        more = self.faulty - len(self.faults)
        return [*map(str, self.faults), *([f"and {more:,} more"] if more else [])]

    def lines(self) -> list[str]:
        """The report in words, a sentence a line."""
        kinds = ", ".join(f"{count:,} of {name}" for name, count in self.conventions.most_common())
        found = [f"{self.source}: {self.rows:,} rows ({kinds})."]
        if self.unused_fields:
            names = [name for name, _ in self.unused_fields.most_common(_FIELDS)]
            more = ", ..." if len(self.unused_fields) > len(names) else ""
            found.append(f"Not used: {', '.join(names)}{more}.")
        if self.faulty:
            found.append(f"{self.faulty:,} of {self.rows:,} rows can't be used: {'; '.join(self.fault_lines())}.")
        of_rows = f"of {self.rows:,} rows"
        longer = f"{of_rows} have more than {self.seq_len:,} tokens"
        if self.cut:
            found.append(f"{self.cut:,} {longer}: cut into pieces, all kept.")
        if self.truncated:
            found.append(f"{self.truncated:,} {longer}: their ends are cut off.")
        if self.dropped:
            found.append(f"{self.dropped:,} {of_rows} are dropped: nothing to learn is left in them.")
        if self.held_out:
            found.append(f"{self.held_out:,} pieces are held out, {self.pieces:,} trained on.")
        filled = self.tokens / (self.sequences * self.seq_len)
        how = f"packed into {self.sequences:,} sequences, {filled:.0%} full" if self.packed else "a sequence each"
        found.append(
            f"An epoch: {format_count(self.tokens)} tokens, {format_count(self.learned)} with a loss; "
            f"{self.pieces:,} documents, {how}."
        )
        return found
