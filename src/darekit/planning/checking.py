# SPDX-License-Identifier: Apache-2.0
"""Everything that is known of a merge without its weights: all problems at once, or the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from darekit.errors import DarekitError, HomologyError
from darekit.inputs.headers import Headers
from darekit.planning.matching.alignment import Heads, align
from darekit.planning.opening import OPENERS, Inputs, open_inputs, open_nested
from darekit.planning.plan import SHARD_SIZE, Plan
from darekit.planning.problems import Collected
from darekit.recipe import Recipe


@dataclass(frozen=True)
class Findings:
    """What a check found.

    Attributes:
        problems: all that is wrong.
        unread: what was not looked at, since it takes values.
        plan: None where there are problems; its files are open.
        inputs: what has opened.
        downloads: bytes of weights that are not on this machine, by model on the Hub.
    """

    problems: tuple[DarekitError, ...]
    unread: tuple[str, ...]
    plan: Plan | None
    inputs: Inputs
    downloads: Mapping[str, int]


@contextmanager
def check_recipe(recipe: Recipe, *, search: Sequence[Path] = (), shard_size: int = SHARD_SIZE) -> Iterator[Findings]:
    """Open the recipe's checkpoints (headers only) and plan, and collect what is wrong; files are closed on leaving.

    The steps are those of `open_plan`. What does not open is left out of the comparisons that follow, and where models
    do not belong together each of them is compared alone.
    """
    problems = Collected()
    with ExitStack() as opened:
        headers = Headers(OPENERS, Path(opened.enter_context(TemporaryDirectory(prefix="darekit-"))))
        openers = (open_nested(recipe, headers.openers), *headers.openers)
        inputs = opened.enter_context(open_inputs(recipe, search=search, openers=openers, problems=problems))
        plan = None
        if problems.found:
            _compare(recipe, inputs, problems)
        else:
            plan = _plan(recipe, inputs, problems, shard_size)
        yield Findings(tuple(problems.found), _unread(recipe, headers), plan, inputs, headers.missing)


def _unread(recipe: Recipe, headers: Headers) -> tuple[str, ...]:
    """What only values tell, which `dare merge --dry-run` and the merge look at."""
    found = ["NaN and Inf in the weights"]
    if recipe.base_model is not None:
        found.insert(0, "whether the models are fine-tunes of the base, by a sample of their values")
    for ref, names in headers.asked.items():
        some = f"{len(names)} tensors of {ref}, such as {min(names)}" if len(names) > 1 else f"{min(names)} of {ref}"
        found.append(f"values of {some}: copies are taken to be what the config says, drop_rate: auto is not known")
    return tuple(found)


def _plan(recipe: Recipe, inputs: Inputs, problems: Collected, shard_size: int) -> Plan | None:
    try:
        return inputs.plan(recipe, shard_size=shard_size, verbatim=False, problems=problems)
    except HomologyError as error:
        alone = Collected()
        _compare(recipe, inputs, alone)
        # Several models may differ in different ways, of which the plan met the first.
        if len(alone.found) > 1:
            problems.found = [one for one in problems.found if one is not error] + alone.found
        else:
            problems.add(error)
    except DarekitError as error:
        problems.add(error)
    return None


def _compare(recipe: Recipe, inputs: Inputs, problems: Collected) -> None:
    """Each model that has opened with the base, or with the first model where there is none."""
    models = [one for one in inputs.models if one is not None]
    first = inputs.base or (models[0] if models else None)
    if recipe.slices or first is None:  # which tensors of a stack correspond is known when all of it is
        return
    vocab = "pad" if recipe.tokens else recipe.vocab
    for model in models:
        if model is not first:
            pair = [model] if inputs.base else [first, model]
            # Heads that one model gives are nobody else's concern.
            heads: Heads = "common" if recipe.heads is not None else "merged"
            problems.attempt(partial(align, inputs.base, pair, vocab, heads=heads, extras=recipe.base_extras))
