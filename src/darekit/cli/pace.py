# SPDX-License-Identifier: Apache-2.0
"""How long the rest will take, judged by how long things took so far."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Pace:
    """The pace at which things are finished, one after another or several at once.

    What is done once (opening models, compiling, a first batch) is in the time of the first ones, so these are left
    out; and nothing is said before some more were finished.

    Attributes:
        begun: how many were finished when this run began.
        first: how many are left out: as many as are worked on at once.
        enough: how many must have been finished after those before an estimate means something.

    Examples:
        >>> pace = Pace(begun=0, first=1, enough=2)
        >>> for done, now in ((1, 100.0), (2, 102.0), (3, 104.0)):  # the first took 100 seconds
        ...     pace.note(done, now)
        ...     print(pace.left(10 - done, now))
        None
        None
        14.0
    """

    begun: float = 0
    first: float = 1
    enough: float = 1
    _from: tuple[float, float] | None = field(default=None, repr=False)
    _last: tuple[float, float] | None = field(default=None, repr=False)

    def note(self, done: float, now: float) -> None:
        """So many are finished now, in seconds of any clock."""
        if done - self.begun < self.first:
            return
        if self._from is None:
            self._from = done, now
        if self._last is None or done > self._last[0]:
            self._last = done, now

    def left(self, rest: float, now: float) -> float | None:
        """Seconds until the rest is finished, too; None as long as nothing can be said."""
        if self._from is None or self._last is None or rest <= 0:
            return None
        (begun, since), (done, last) = self._from, self._last
        if done - begun < self.enough:
            return None
        seconds = (last - since) / (done - begun) * rest - (now - last)
        return seconds if seconds > 0 else None  # what takes longer than all others has no time left that is known
