# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as one tree.

```text
DarekitError            everything below; the command line prints its message and exits with 1
|- RecipeError          the recipe's text: unknown key, contradiction, value out of range
|- CheckpointError      one checkpoint cannot be read: not found, malformed, changed while it was read
|  '- Unsupported       it can be read, but not merged as it is: quantised, an adapter, pickled
|     |- HoldsPack      it is a pack, given where a checkpoint is expected
|     |- HoldsAdapter   it is an adapter, given where a checkpoint is expected
|     '- NotFetched     values were asked of a model of which only the headers are here
|- HomologyError        the checkpoints do not belong together: names, shapes, vocabulary, wrong base
|- PlanError            a parameter is impossible for these tensors
|- MethodError          somebody's own method: cannot be registered or loaded, or failed
|- DataError            values: NaN, Inf, overflow of the output dtype, integer tensors that differ
'- OutputError          the output: exists, in use, disk full, cannot be resumed
```

Every message says what was found, what was expected, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class DarekitError(Exception):
    """Base of every error that darekit raises on purpose: one `except` for all of them.

    Examples:
        >>> try:
        ...     dk.merge("recipe.yaml", "base")
        ... except dk.DarekitError as error:
        ...     print(type(error).__name__)
        OutputError
    """


class RecipeError(DarekitError):
    """A recipe that cannot mean anything: the message names file, line and key.

    `keys`: the paths of the keys that are wrong; none where it is not a key that is.
    """

    def __init__(self, message: str, keys: Sequence[tuple[str | int, ...]] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class CheckpointError(DarekitError):
    """A checkpoint that cannot be read: the message names the file and, where there is one, the tensor."""


class Unsupported(CheckpointError):
    """A checkpoint that is well-formed, but that darekit will not merge as it is."""


class HoldsPack(Unsupported):
    """A pack where a checkpoint was expected; `path` is its file."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class HoldsAdapter(Unsupported):
    """An adapter where a checkpoint was expected; `path` is its folder."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class NotFetched(Unsupported):
    """Values of a model of which only the headers were fetched."""


class HomologyError(DarekitError):
    """Checkpoints that do not belong together."""


class PlanError(DarekitError):
    """A parameter that is impossible for the tensors at hand."""


class MethodError(DarekitError):
    """A method of somebody's own that cannot be registered or loaded, or that failed: the message names it."""


class DataError(DarekitError):
    """Values that must not be merged or written."""


class OutputError(DarekitError):
    """An output that cannot be written, published or resumed."""
