# SPDX-License-Identifier: Apache-2.0
"""`dare recommend`: what may be dropped of a model, tensor by tensor, what that is predicted to do, and a recipe.

Data-free, each tensor's r = ||dW|| / ||W|| predicts; with text, what the model's own inputs say of each linear layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from darekit.analysis.inspection import TensorReport, inspect
from darekit.architectures.groups import ONE_TERM, is_kept_dense
from darekit.errors import OutputError, PlanError
from darekit.methods.sparsifiers import noise_gain
from darekit.planning.checks import check
from darekit.planning.homology import RULE_OF_THUMB, TAU, p_max, weighted_median
from darekit.planning.opening import open_plan
from darekit.planning.rates import MOST, PAYS_FIRST, rate_within, rounded_down, spend
from darekit.recipe import Filtered, Filters, Recipe, Value
from darekit.recipe.single import drop_recipe
from darekit.wording import brief, label
from darekit.wording.progress import Progress

if TYPE_CHECKING:
    from darekit.recommendation.calibration import Calibration, Layer
    from darekit.recommendation.shrinkage import Search

ROWS = 64
# Real inputs lie along a layer's strong directions, so that its output is larger than r makes one think and the same
# noise is a smaller part of it: at one tau, measured rates are higher, and were too high at 0.2 (decision 0012).
TAU_MEASURED = 0.1
REASONS = {
    "embeddings": "each output is one row of it: no sum in which noise averages out",
    "norms": "each output is one element times one input: no sum in which noise averages out",
    "biases": "each output is one element: no sum in which noise averages out",
}


@dataclass(frozen=True)
class TensorAdvice:
    """One tensor that may be dropped.

    Attributes:
        name: the tensor.
        shape: its shape.
        parameters: its elements.
        r: ||dW|| / ||W||, over all elements.
        p_max: the largest drop rate within tau; by the layer's own inputs where they were seen, else by r.
        drop_rate: what the recipe says.
        rho: predicted perturbation of the layer's output at that rate, relative to the output.
        kappa: coherence of the delta with the layer's inputs; None where no inputs were seen.
        noise_to_signal: predicted noise at that rate, relative to what fine-tuning does to the output.
        group: embeddings, norms, biases or heads; None: another matrix.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    r: float
    p_max: float
    drop_rate: float
    rho: float
    kappa: float | None = None
    noise_to_signal: float | None = None
    group: str | None = None

    def to_data(self) -> dict[str, Any]:
        """JSON-able form; an infinite number (a tensor that the base has as zeros) is null."""
        numbers = {name: _finite(value) for name, value in self.__dict__.items() if name not in ("shape", "group")}
        return numbers | {"shape": list(self.shape), "group": self.group}


@dataclass(frozen=True)
class DenseTensor:
    """One tensor that is not dropped.

    Attributes:
        name: the tensor.
        parameters: its elements.
        r: ||dW|| / ||W||.
        reason: why it stays dense.
    """

    name: str
    parameters: int
    r: float
    reason: str

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "r": _finite(self.r)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Recommendation:
    """What may be dropped of `model`.

    Attributes:
        base: as written.
        model: as written.
        tau: the relative perturbation that a layer's output may have.
        drop_rate: median of the tensors' p_max, weighted by their parameters, at most 0.99.
        tensors: those that may be dropped.
        dense: those that stay as they are.
        verdict: ok, large or wrong_base, as of `inspect`.
        words: the verdict in a sentence.
        assumed: what the prediction takes for granted.
        asked: the one rate that was to be judged.
        budget: the fraction of elements that was to be kept.
        recipe: drops each tensor at its own rate.
        calibration: what the model's inputs said; None without data.
        search: what was tried for DAREx's q; None where it was not searched.
        notes: notes and warnings for the user.
    """

    base: str
    model: str
    tau: float
    drop_rate: float
    tensors: tuple[TensorAdvice, ...]
    dense: tuple[DenseTensor, ...]
    verdict: str
    words: str
    assumed: str
    asked: float | None
    budget: float | None
    recipe: Recipe
    calibration: Calibration | None = None
    search: Search | None = None
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        return brief(
            self, f"{self.model} on {self.base}: drop rate {self.drop_rate:.3g}, keeps {round(self.kept):,} of "
            f"{self.parameters:,} parameters, predicted perturbation {self.rho[0]:.3g}",
        )  # fmt: skip

    @property
    def droppable(self) -> int:
        """Parameters of the tensors that may be dropped."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """All float parameters."""
        return self.droppable + sum(tensor.parameters for tensor in self.dense)

    @property
    def kept(self) -> float:
        """How many of them the recipe is expected to keep."""
        return self.parameters - sum(tensor.parameters * tensor.drop_rate for tensor in self.tensors)

    @property
    def rho(self) -> tuple[float, float]:
        """Predicted relative perturbation of a layer's output: median over parameters, and the largest."""
        median = weighted_median((tensor.rho, tensor.parameters) for tensor in self.tensors)
        return median, max((tensor.rho for tensor in self.tensors), default=0.0)

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        median, largest = self.rho
        calibration = self.calibration
        return {
            "base": self.base,
            "model": self.model,
            "verdict": self.verdict,
            "words": self.words,
            "tau": self.tau,
            "drop_rate": self.drop_rate,
            "budget": self.budget,
            "assumed": self.assumed,
            "parameters": self.parameters,
            "droppable_parameters": self.droppable,
            "kept": round(self.kept),
            "mean_drop_rate": 1 - self.kept / self.parameters if self.parameters else 0.0,
            "rho": {"median": median, "largest": _finite(largest)},
            "calibration": calibration and {"rows": calibration.rows, "tokens": calibration.tokens},
            "tensors": [tensor.to_data() for tensor in self.tensors],
            "dense": [tensor.to_data() for tensor in self.dense],
            "q": self.search and self.search.to_data(),
            "notes": list(self.notes),
            "recipe": self.recipe.to_data(),
        }


def recommend(
    base: str | Path,
    model: str | Path,
    *,
    tau: float | None = None,
    drop_rate: float | None = None,
    budget: float | None = None,
    data: str | Path | None = None,
    search_q: bool = False,
    keep_dense: Sequence[str] = ONE_TERM,
    seed: int | None = None,
    vocab: str = "strict",
    heads: str | None = None,
    limit: int = ROWS,
    batch_size: int = 8,
    max_length: int = 512,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], Progress | None] | None = None,
) -> Recommendation:
    """Say how much of a model's delta may be dropped, tensor by tensor, and what that is predicted to do.

    Args:
        base: the checkpoint that `model` was fine-tuned from.
        model: the fine-tuned model.
        tau: the relative perturbation that a layer's output may have; 0.2 if not given, 0.1 with data.
        drop_rate: judge this one rate for all tensors, instead of what tau allows.
        budget: keep this fraction of the elements that may be dropped, where it hurts least, instead of what tau
            allows.
        data: JSON lines (or a data set's name) of text like what the model is used on; labels are ignored.
        search_q: with data: search the factor of DAREx's q.
        keep_dense: groups or globs of tensors that are not dropped.
        seed: the mask's effective seed, for the search and in the recipe.
        vocab: how the recipe treats vocabularies that differ: strict, base or pad.
        heads: `base` or `model`: whose heads the recipe takes as they are.
        limit: rows of data that are read.
        batch_size: rows that run at once.
        max_length: tokens of one row; the rest is cut.
        device: cpu, cuda or mps; the fastest available if not given.
        dtype: number format to compute in; float32 on a CPU if not given.
        threads: worker threads that read weights.
        progress: called with a description of each step; returns None, or a function called with (done, in all).

    Returns:
        Drop rates, predictions, and a recipe that drops each tensor at its own rate.

    Raises:
        DarekitError: see `darekit.errors`.

    Examples:
        >>> found = dk.recommend("base", "math")
        >>> found
        <Recommendation: math on base: drop rate 0.961, keeps 4,038 of 23,712 parameters, predicted perturbation 0.2>
        >>> found.tensors[0].name, found.tensors[0].drop_rate
        ('lm_head.weight', 0.9625)
        >>> report = dk.merge(found.recipe, "math-dropped")

        By a budget: keep a twentieth of what may be dropped, where it hurts least:

        >>> found = dk.recommend("base", "math", budget=0.05)
        >>> round(found.kept), found.parameters
        (4257, 23712)
    """
    tau = (TAU if data is None else TAU_MEASURED) if tau is None else tau
    _check(tau=tau, drop_rate=drop_rate, budget=budget)
    if search_q and data is None:
        raise PlanError("the search of q compares outputs: it needs data (--data FILE, a text on each line)")
    rows = None
    if data is not None:  # mistakes in it are told before anything long
        from darekit.live.data import read_rows

        rows = read_rows(data, limit=limit)
    step = progress or (lambda what: None)
    base, model = str(base), str(model)
    found = inspect(base, model, threads=threads, progress=step("reading both models"))
    whole = drop_recipe(base, model, drop_rate=0.0, keep_dense=keep_dense, seed=seed, vocab=vocab, heads=heads)
    calibration = feed = None
    if rows is not None:
        from darekit.recommendation.calibration import calibrate
        from darekit.recommendation.inputs import Feed

        feed = Feed(rows, batch_size, max_length)
        with open_plan(whole) as plan:
            calibration = calibrate(plan, feed, device=device, dtype=dtype, progress=step("running the model"))
    own_heads = {report.name for report in found.tensors if heads is not None and report.head}
    dense, open_tensors = _divide(found.tensors, keep_dense, own_heads)
    layers = calibration.layers if calibration else {}
    tensors = _advise(open_tensors, layers, tau=tau, drop_rate=drop_rate, budget=budget)
    recipe = _recipe(whole, tensors, 1.0)
    search = None
    if search_q and feed is not None:
        from darekit.recommendation.shrinkage import search_factor

        with open_plan(whole) as plan:
            search = search_factor(
                plan, lambda k: open_plan(_recipe(whole, tensors, k)), feed, device=device, dtype=dtype,
                progress=step("searching q"),
            )  # fmt: skip
        recipe = _recipe(whole, tensors, search.best)
    return Recommendation(
        base, model, tau, min(MOST, weighted_median((t.p_max, t.parameters) for t in tensors)), tensors, dense,
        found.verdict, _words(found.verdict, found.words, base, model), _assumed(calibration, tau), drop_rate, budget,
        recipe, calibration, search,
        (*_notes(tensors, calibration, budget, drop_rate), *([found.rounding] if found.rounding else [])),
    )  # fmt: skip


def _check(**given: float | None) -> None:
    if given["drop_rate"] is not None and given["budget"] is not None:
        raise PlanError("a drop rate and a budget are two ways to set how much is dropped; give only one of them")
    for name, low in (("tau", 0.001), ("drop_rate", 0.0), ("budget", 0.0)):
        value = given[name]
        if value is not None and not low <= value <= 1:
            raise PlanError(f"{name} must be in [{low:g}, 1], found {value}")


def _divide(
    reports: Sequence[TensorReport], keep_dense: Sequence[str], own_heads: Container[str]
) -> tuple[tuple[DenseTensor, ...], list[TensorReport]]:
    """Reports of all tensors -> those that stay dense, with the reason, and those that may be dropped."""
    dense, rest = [], []
    for report in reports:
        pattern = next((p for p in keep_dense if is_kept_dense(report.name, report.group, [p])), None)
        if report.name in own_heads:
            reason = "a head that is taken as it is"
        elif pattern is not None:
            reason = REASONS.get(pattern, f"kept dense by {pattern}")
        elif report.parameters:
            rest.append(report)
            continue
        else:
            continue
        dense.append(DenseTensor(report.name, report.parameters, report.r, reason))
    return tuple(dense), rest


def _advise(
    reports: Sequence[TensorReport],
    layers: Mapping[str, Layer],
    *,
    tau: float,
    drop_rate: float | None,
    budget: float | None,
) -> tuple[TensorAdvice, ...]:
    """Rates by tau, by a budget, or one rate for all; and what each is predicted to do."""
    sizes = [report.parameters for report in reports]
    # How far an output moves at p/(1-p) = 1, relative to it: seen on real inputs, else r.
    moves = [layers[report.name].r if report.name in layers else report.r for report in reports]
    if budget is not None:
        rates = [rounded_down(p) for p in spend(sizes, [move * move for move in moves], budget * sum(sizes))]
    elif drop_rate is not None:
        rates = [drop_rate] * len(sizes)
    else:
        rates = [rate_within(move, tau) for move in moves]
    found = []
    for report, move, rate in zip(reports, moves, rates, strict=True):
        layer, gain = layers.get(report.name), noise_gain(rate)
        found.append(
            TensorAdvice(
                report.name, report.shape, report.parameters, report.r, p_max(move, tau), rate,
                move * gain if gain else 0.0, layer.kappa if layer else None,
                layer.noise_to_signal(rate) if layer else None, report.group,
            )
        )  # fmt: skip
    return tuple(found)


def _recipe(whole: Recipe, tensors: Sequence[TensorAdvice], factor: float) -> Recipe:
    """The recipe that drops each tensor at its own rate and, where factor is not 1, divides by factor x (1 - p)."""
    assert whole.sparsify is not None
    rates = Filters(
        (*(Filtered(f"={tensor.name}", tensor.drop_rate) for tensor in tensors), Filtered("*", 0.0))
    )  # fmt: skip
    parameters: dict[str, Value] = {"drop_rate": rates}
    if factor != 1.0:
        divisors = (Filtered(f"={t.name}", divisor(t.drop_rate, factor)) for t in tensors)
        parameters["q"] = Filters((*divisors, Filtered("*", 0.0)))
    return replace(whole, sparsify=replace(whole.sparsify, parameters=parameters), text="", notes=())


def divisor(drop_rate: float, factor: float) -> float:
    """q = factor x (1 - p), never above 1; six digits.

    >>> divisor(0.99, 1.5), divisor(0.5, 4.0)
    (0.015, 1.0)
    """
    return min(1.0, round(factor * (1.0 - drop_rate), 6))


def _words(verdict: str, words: str, base: str, model: str) -> str:
    if verdict == "wrong_base":
        return words
    return f"judging by sizes, {label(base)} is {label(model)}'s base" if verdict == "ok" else words


def _assumed(calibration: Calibration | None, tau: float) -> str:
    limit = f"a layer's output may change by at most tau = {tau:g} of its size {RULE_OF_THUMB}"
    if calibration is None:
        return f"assumed: inputs without a preferred direction, so that rho = r sqrt(p/(1-p)); {limit}"
    return (
        f"measured on {calibration.rows} rows ({calibration.tokens} tokens): each layer's inputs, so that rho = "
        f"sqrt(p/(1-p) S)/||W X||; assumed: other text is like it; {limit}"
    )


def _notes(
    tensors: Sequence[TensorAdvice], calibration: Calibration | None, budget: float | None, drop_rate: float | None
) -> Iterator[str]:
    if not tensors:
        yield "nothing may be dropped: every tensor stays dense (--keep-dense none drops all)"
    if budget is None and drop_rate is None and any(tensor.p_max > MOST for tensor in tensors):
        yield (
            f"no tensor is dropped above {MOST:g}, although tau would allow it: small models, and the paper's 7B and "
            f"13B ones, lost their abilities there; {PAYS_FIRST}"
        )
    if calibration is not None:
        unseen = [tensor.name for tensor in tensors if tensor.kappa is None]
        if unseen:
            more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            yield f"no input was seen for {', '.join(unseen[:3])}{more}: judged by r"
    if any(math.isinf(tensor.r) for tensor in tensors):
        yield "r is infinite where the base has only zeros: those tensors are all delta and are kept whole"


# --- the recipe as a file


def write_recipe(found: Recommendation, out: Path, *, overwrite: bool = False) -> tuple[list[str], bool]:
    """Write the recipe, after planning it: what is written runs.

    Returns:
        what the check of a merge will say of it, and whether it will ask for --force (the check knows r alone: it may
        refuse what the inputs allow).

    Raises:
        OutputError: it exists, or cannot be written.
        HomologyError: the models' vocabularies or heads differ, and neither `vocab` nor `heads` says what to do.
    """
    check_out(out, overwrite=overwrite)
    text = recipe_text(found)
    said: list[str] = []
    with open_plan(replace(found.recipe, text=text)) as plan:
        stopped = any(judgement.stop for judgement in check(plan, force=True, say=said.append))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    return said, stopped


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Whether a recipe may be written there.

    Raises:
        OutputError: it exists, has no folder, or a name that no recipe has.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise OutputError(f"{out} must end in .yaml, by which recipes are recognised")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another name, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {out.parent}")


def recipe_text(found: Recommendation) -> str:
    """The recipe as YAML, one line for each tensor, that says where it comes from."""
    data = found.recipe.to_data()
    median, largest = found.rho
    lines = [
        f"# dare recommend {found.base} {found.model}",
        f"# {found.assumed}",
        f"# predicted perturbation of a layer's output: {median:.3g} (median), {largest:.3g} (largest)",
    ]
    sparsify = data.pop("sparsify")
    lists = {name: sparsify.pop(name) for name in ("drop_rate", "q") if name in sparsify}
    head = {"base_model": data.pop("base_model"), "models": data.pop("models")}
    lines += [yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "sparsify:"]
    lines += [f"  {line}" for line in yaml.safe_dump(sparsify, sort_keys=False, allow_unicode=True).splitlines()]
    for name, entries in lists.items():
        lines.append(f"  {name}:")
        lines += [f"    - {{filter: {json.dumps(e['filter'])}, value: {e['value']!r}}}" for e in entries]
    return "\n".join([*lines, yaml.safe_dump(data, sort_keys=False, allow_unicode=True)])
