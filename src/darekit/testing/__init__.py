# SPDX-License-Identifier: Apache-2.0
"""The test that every method must pass, for methods of your own: the built-in ones pass the same.

```python
import pytest
from darekit import testing

@pytest.mark.parametrize("check", testing.checks("strongest"), ids=str)
def test_strongest(check):
    check()
```

The reference is `reference`: a merge written down as the formulas have it, on whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from darekit.errors import MethodError
from darekit.methods import MERGE_METHODS, SPARSIFIERS, installed
from darekit.testing.checks import COMMON, DROP_RATE, OF_MERGES, OF_SPARSIFIERS, equals_formula
from darekit.testing.reference import reference
from darekit.testing.subjects import Subject

__all__ = ["Check", "Subject", "checks", "checks_of", "conforms", "equals_formula", "reference"]


@dataclass(frozen=True)
class Check:
    """One thing that a method must do; calling it raises AssertionError if the method does not.

    Attributes:
        method: its name.
        title: what it must do.
        run: the check itself.

    Examples:
        >>> from darekit import testing
        >>> check = testing.checks("linear")[0]
        >>> check.method, check.title
        ('linear', 'equals its function on whole tensors')
        >>> check()
    """

    method: str
    title: str
    run: Callable[[], None]

    def __call__(self) -> None:
        """Run it."""
        self.run()

    def __str__(self) -> str:
        return f"{self.method} {self.title}"


def conforms(method: str, **parameters: Any) -> None:
    """Run all that `checks` lists.

    Args:
        method: a name of a merge method or sparsifier.
        **parameters: its parameters, where they are not the defaults.

    Raises:
        AssertionError: the method does not do what it must; the message says which check failed.
        MethodError: no method has this name.

    Examples:
        >>> from darekit import testing
        >>> testing.conforms("linear")
    """
    for check in checks(method, **parameters):
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"{check}: {error}") from error


def checks(method: str, **parameters: Any) -> tuple[Check, ...]:
    """What a method must do, one by one: pass them to `pytest.mark.parametrize` with `ids=str`.

    Args:
        method: a name of a merge method or sparsifier.
        **parameters: its parameters, where they are not the defaults.

    Returns:
        The checks, each to be called. All take a second or two together.

    Raises:
        MethodError: no method has this name.

    Examples:
        >>> from darekit import testing
        >>> for check in testing.checks("magnitude", drop_rate=0.5)[:3]:
        ...     print(check)
        magnitude equals its function on whole tensors
        magnitude does not depend on tiles and threads
        magnitude does not depend on files and shards
    """
    if method not in MERGE_METHODS and method not in SPARSIFIERS:
        installed.load(method)
    if method in MERGE_METHODS:
        return checks_of(Subject(merge=(method, parameters)))
    if method in SPARSIFIERS:
        return checks_of(Subject(sparsify=(method, {"drop_rate": DROP_RATE} | parameters)))
    raise MethodError(f"{method!r} is not a method; import the module that registers it")


def checks_of(subject: Subject) -> tuple[Check, ...]:
    """The same of a subject: of its sparsifier, where it has one, else of its merge method."""
    method = subject.sparsify[0] if subject.sparsify else subject.merge[0]
    found = {**COMMON, **(OF_SPARSIFIERS if subject.sparsify else OF_MERGES)}
    return tuple(Check(method, title, partial(run, subject)) for title, run in found.items())
