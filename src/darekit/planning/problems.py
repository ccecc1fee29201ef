# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a merge: the first problem raised, or all of them collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from darekit.errors import DarekitError

T = TypeVar("T")


class Problems:
    """Raises what is wrong as soon as it is met: a merge ends there."""

    def attempt(self, step: Callable[[], T]) -> T | None:
        """The step's result."""
        return step()

    def need(self, step: Callable[[], T]) -> T:
        """The step's result, without which nothing goes on: its error is raised."""
        return step()

    def stop(self) -> None:
        """Called where the steps that follow need the results of all before."""


class Collected(Problems):
    """Keeps what is wrong in `found`, so that steps that do not depend on each other each have their say."""

    def __init__(self) -> None:
        self.found: list[DarekitError] = []

    def add(self, error: DarekitError) -> None:
        """Keep a problem, told once."""
        if str(error) not in map(str, self.found):
            self.found.append(error)

    def attempt(self, step: Callable[[], T]) -> T | None:
        """The step's result; None where it failed, and `found` has why."""
        try:
            return step()
        except DarekitError as error:
            self.add(error)
            return None

    def need(self, step: Callable[[], T]) -> T:
        """The step's result; its error is kept, and raised."""
        try:
            return step()
        except DarekitError as error:
            self.add(error)
            raise

    def stop(self) -> None:
        """Raise the first of the problems, where there are any."""
        if self.found:
            raise self.found[0]
