# SPDX-License-Identifier: Apache-2.0
"""Whose code a recipe runs: of each of its methods that is not built in, the package that brought it, and a digest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from darekit.code import digest_of_code
from darekit.errors import MethodError
from darekit.methods import SPARSIFIERS, installed, registry
from darekit.methods.foreign import Foreign
from darekit.recipe.data import Recipe


@dataclass(frozen=True)
class Origin:
    """A registered method as another process, or a later run, must have it.

    Attributes:
        kind: `merge method` or `sparsifier`.
        name: the word in recipes.
        module: the module that registered it.
        function: the function's name in its module.
        distribution: name and version of the installed package that brings it; None where no package does.
        code: digest of the function's source.
    """

    kind: str
    name: str
    module: str
    function: str
    distribution: str | None
    code: str

    def identity(self) -> dict[str, Any]:
        """What must be equal for equal results, JSON-able."""
        return {"distribution": self.distribution, "code": self.code}

    def to_data(self) -> dict[str, Any]:
        """What the lock says of it."""
        return {"name": self.name, "kind": self.kind, "function": f"{self.module}:{self.function}", **self.identity()}


def used_by(recipe: Recipe) -> tuple[str, ...]:
    """The names of the recipe's methods: its sparsifier, where it has one, and its merge method; those of stages."""
    own = (*([recipe.sparsify.method] if recipe.sparsify else []), recipe.merge_method)
    return tuple(dict.fromkeys((*own, *(name for _, stage in recipe.stages for name in used_by(stage)))))


def origins_of(recipe: Recipe) -> tuple[Origin, ...]:
    """Of the recipe's methods those that are not built in."""
    return tuple(_origin(found) for name in used_by(recipe) if (found := registry.foreign_of(name)))


def _origin(foreign: Foreign) -> Origin:
    return Origin(
        kind="sparsifier" if foreign.name in SPARSIFIERS else "merge method",
        name=foreign.name,
        module=foreign.module,
        function=foreign.function.__qualname__,
        distribution=installed.distribution_of(foreign),
        code=digest_of_code(foreign.function),
    )


def require(origins: Iterable[Origin]) -> None:
    """In a new process: register these methods, by importing the modules that do it.

    Raises:
        MethodError: a method is not registered there, or by other code.
    """
    for origin in origins:
        if registry.foreign_of(origin.name) is None:
            _bring(origin)
        found = registry.foreign_of(origin.name)
        if found is None:
            raise MethodError(
                f"{origin.kind} {origin.name} is registered by {origin.module}, but not when another process imports "
                'it: move it into a module of its own, and not below `if __name__ == "__main__":`, or do without --jobs'
            )
        if _origin(found).code != origin.code:
            raise MethodError(f"{origin.kind} {origin.name}: its code has changed since the run began; start it again")


def _bring(origin: Origin) -> None:
    if origin.distribution is not None:
        installed.load(origin.name)
    if origin.module in ("__main__", "__mp_main__"):
        return  # what starts a process runs the main file there, where there is one
    try:
        import_module(origin.module)
    except Exception as error:  # whatever other people's code may raise
        raise MethodError(
            f"{origin.kind} {origin.name}: {origin.module} cannot be imported in another process: "
            f"{type(error).__name__}: {error}"
        ) from error
