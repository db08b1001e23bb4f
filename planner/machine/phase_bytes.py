"""Bytes that one phase of a computation makes, apart from those that it was given and may free."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import accumulate


@dataclass(slots=True)
class PhaseBytes:
    """What a phase made and has alive: `alive` now, `peaks` at most between two freeings of what another phase made.

    `freed` are the bytes of those freeings, in order: one fewer than there are peaks. `made` is all that it made.

    >>> phase = PhaseBytes()
    >>> phase.make(8); phase.free_own(6); before = phase.free_other(4); phase.make(3)
    >>> before, phase.peaks, phase.freed
    (0, [8, 5], [4])
    >>> phase.made
    11
    """

    alive: int = 0
    made: int = 0
    peaks: list[int] = field(default_factory=lambda: [0])
    freed: list[int] = field(default_factory=list)

    def make(self, num_bytes: int) -> None:
        """The phase makes `num_bytes`."""
        self.made += num_bytes
        self.alive += num_bytes
        self.peaks[-1] = max(self.peaks[-1], self.alive)

    def free_own(self, num_bytes: int) -> None:
        """It frees `num_bytes` that it made."""
        self.alive -= num_bytes

    def free_other(self, num_bytes: int) -> int:
        """It frees `num_bytes` that another phase made; how many such freeings there were before."""
        self.freed.append(num_bytes)
        self.peaks.append(self.alive)
        return len(self.freed) - 1

    @property
    def rise_bytes(self) -> int:
        """The most that was alive above what was alive when the phase began.

        >>> PhaseBytes(peaks=[1, 5], freed=[2]).rise_bytes
        3
        """
        gone = [0, *accumulate(self.freed)]
        return max(0, *(peak - freed for peak, freed in zip(self.peaks, gone, strict=True)))

    def raised_to(self, rise_bytes: int) -> list[int]:
        """The peaks, all raised by as much as it takes to rise so far.

        >>> PhaseBytes(peaks=[4, 2], freed=[8]).raised_to(7)
        [7, 5]
        """
        more = max(0, rise_bytes - self.rise_bytes)
        return [peak + more for peak in self.peaks]

    def raised_to_those_of(self, seen: PhaseBytes) -> list[int]:
        """The peaks, raised to those of another record of the phase, which saw other things being made and freed.

        What it did not see freed is among what it has alive; so that is added to its peaks from there on.

        >>> tracked = PhaseBytes(peaks=[4, 2], freed=[8])
        >>> tracked.raised_to_those_of(PhaseBytes(peaks=[1, 6, 3], freed=[5, 8]))
        [6, 3]
        >>> tracked.raised_to_those_of(PhaseBytes(peaks=[1]))
        [4, 9]
        """
        same = SequenceMatcher(None, self.freed, seen.freed, autojunk=False).get_matching_blocks()
        both = {block.a + i: block.b + i for block in same for i in range(block.size)}
        raised, position, not_freed = list(self.peaks), 0, 0
        for number, peak in enumerate(self.peaks):
            end = next((there for here, there in both.items() if here >= number), len(seen.freed))
            raised[number] = max(peak, max(seen.peaks[position : end + 1]) + not_freed)
            if number in both:
                position = end + 1
            elif number < len(self.freed):
                not_freed += self.freed[number]
        return raised


def in_blocks(num_bytes: int, block_bytes: int) -> int:
    """The bytes of the whole blocks that an allocator gives for `num_bytes`.

    >>> in_blocks(65, 64), in_blocks(64, 64), in_blocks(5, 1)
    (128, 64, 5)
    """
    return -(-num_bytes // block_bytes) * block_bytes
