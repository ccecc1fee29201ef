# SPDX-License-Identifier: Apache-2.0
"""Extracting an adapter: plan > factors, into a spool > both files, out of sight > publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from darekit import __version__
from darekit.architectures.families import Facts
from darekit.checkpoints.companions import CARD
from darekit.errors import PlanError
from darekit.extraction import adapters
from darekit.extraction.card import adapter_card
from darekit.extraction.deltas import Reader
from darekit.extraction.modules import Saved
from darekit.extraction.plan import VLLM_RANKS, ExtractPlan, Terms, open_plan, terms_of
from darekit.extraction.running import Extracted, Module, Spool, run
from darekit.machine import peak_rss
from darekit.output.card import agreed_license
from darekit.output.staging import open_brief_stage
from darekit.planning.nested import SUFFIXES
from darekit.recipe import Recipe, read_recipe
from darekit.recipe.reading import search_path
from darekit.wording import brief, size_of

FORMAT = "darekit-adapter"


@dataclass(frozen=True)
class ModuleReport:
    """One module of an adapter.

    Attributes:
        name: of the first tensor that it is stored in.
        module: as PEFT calls it; of experts the parameter.
        shape: of one of its matrices, (out, in).
        parameters: elements of its matrices.
        rank: of its factors; 0: fine-tuning left it alone, and the adapter does not have it.
        norm: of its delta.
        error: ||delta - B A|| / ||delta||, measured on the factors as they are stored.
        group: heads; None: another matrix.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    parameters: int
    rank: int
    norm: float
    error: float
    group: str | None = field(default=None, repr=False)

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "shape": list(self.shape)}


@dataclass(frozen=True)
class TensorReport:
    """A tensor that is no matrix of the adapter.

    Attributes:
        name: the tensor.
        kind: norms, biases, heads, routers, embeddings; matrices: one that is none for PEFT.
        parameters: its elements.
        norm: of its delta; None: the base does not have it.
        saved: whether the adapter holds it whole.
        why: it is not.
    """

    name: str
    kind: str
    parameters: int
    norm: float | None
    saved: bool
    why: str = ""

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class ExtractReport:
    """A finished adapter.

    Attributes:
        output: the directory.
        bytes: of the adapter's weights.
        model_bytes: of the model's.
        rank: the largest of its modules.
        modules: one for each matrix, or parameter of experts.
        tensors: all others.
        seconds: without the plan.
        peak_rss_bytes: largest resident memory of the process.
        notes: notes and warnings given during the run.
    """

    output: str
    bytes: int
    model_bytes: int
    rank: int
    modules: tuple[ModuleReport, ...] = field(repr=False)
    tensors: tuple[TensorReport, ...] = field(repr=False)
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return brief(
            self, f"{self.output}, rank {self.rank}, {size_of(self.bytes)}, error {self.error:.3g} of its modules' "
            f"delta, {self.total_error:.3g} of all",
        )  # fmt: skip

    @property
    def error(self) -> float:
        """||what the factors lose|| / ||delta||, over all modules."""
        return _share(self._lost, self._squares)

    @property
    def energy(self) -> float:
        """The share of the modules' squared delta that the factors keep."""
        return 1 - self.error**2

    @property
    def outside(self) -> float:
        """The share of the whole squared delta in tensors that the adapter does not hold at all."""
        left = sum(one.norm**2 for one in self.tensors if one.norm is not None and not one.saved)
        return left / self._everything if self._everything else 0.0

    @property
    def total_error(self) -> float:
        """||model - (base + adapter)|| / ||model - base||, over all tensors that both have."""
        left = sum(one.norm**2 for one in self.tensors if one.norm is not None and not one.saved)
        return _share(self._lost + left, self._everything)

    @property
    def _lost(self) -> float:
        return sum((one.norm * one.error) ** 2 for one in self.modules)

    @property
    def _squares(self) -> float:
        return sum(one.norm**2 for one in self.modules)

    @property
    def _everything(self) -> float:
        return self._squares + sum(one.norm**2 for one in self.tensors if one.norm is not None)

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "output": self.output,
            "bytes": self.bytes,
            "model_bytes": self.model_bytes,
            "rank": self.rank,
            "error": self.error,
            "energy": self.energy,
            "outside": self.outside,
            "total_error": self.total_error,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "notes": list(self.notes),
            "modules": [one.to_data() for one in self.modules],
            "tensors": [one.to_data() for one in self.tensors],
        }


def extract(
    base: str | Path | None,
    model: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    save: Collection[str] | None = None,
    factors: Collection[str] = (),
    server: Literal["vllm"] | None = None,
    out_kind: Literal["peft"] = "peft",
    vocab: Literal["strict", "base"] = "strict",
    threads: int | None = None,
    overwrite: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractReport:
    """Write a model's delta from its base as a LoRA adapter that PEFT and servers load.

    Each matrix of the delta becomes B A, the closest product of that rank, or of the smallest rank that a budget
    allows. A recipe is merged and extracted in one pass: its result is read before it is rounded, and nothing else is
    written.

    Args:
        base: the checkpoint that the adapter is to be put on; None: that of the recipe.
        model: the fine-tuned model: a checkpoint, a pack, or a recipe (a file, its data, or a `Recipe`).
        out: the directory to write.
        rank: of every module.
        energy: instead, the share of each delta's squared norm that is kept, in (0, 1].
        error: instead, how much of each delta's norm may be lost, in [0, 1).
        max_rank: the most that `energy` or `error` may ask for.
        dtype: of the factors.
        save: kinds of tensors that are saved whole: norms, biases, heads, routers, embeddings; all but the embeddings
            if not given. What is no matrix and not saved is left out.
        factors: what gets factors besides layers of matrices, as PEFT has them: embeddings, convolutions.
        server: vllm: keep to what vLLM loads: nothing saved whole, ranks up to 512, no factors of embeddings.
        out_kind: the only one there is: peft.
        vocab: what to do with vocabularies that differ: strict refuses, base keeps to the rows of the base.
        threads: worker threads, each with one matrix at a time.
        overwrite: replace `out` once the adapter is complete.
        force: continue even if the base looks wrong.
        progress: called with (elements done, elements in all).
        say: receives notes and warnings as they arise.

    Returns:
        Ranks, errors and sizes, module by module, and what is not in the adapter.

    Raises:
        DarekitError: see `darekit.errors`; nothing is published then.

    Examples:
        >>> report = dk.extract("base", "math", "math-lora", rank=8)
        >>> sorted(path.name for path in Path("math-lora").iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
        >>> report.rank, round(report.error, 2), round(report.outside, 3)
        (8, 0.66, 0.129)

        By an error budget, and of a merge that is written nowhere:

        >>> recipe = {"base_model": "base", "models": ["math", "code"], "merge_method": "task_arithmetic"}
        >>> report = dk.extract("base", recipe, "both-lora", error=0.5, save=["norms", "embeddings"])
        >>> report.error <= 0.5, report.outside
        (True, 0.0)
    """
    recipe = recipe_in(model)
    terms = terms_of(
        rank=rank, energy=energy, error=error, max_rank=max_rank, dtype=dtype, save=save, server=server,
        out_kind=out_kind, recipe=recipe, factors=factors,
    )  # fmt: skip
    return run_extraction(
        base, model, Path(out), terms, vocab=vocab, threads=threads, overwrite=overwrite, force=force,
        progress=progress, say=say,
    )  # fmt: skip


def run_extraction(
    base: str | Path | None, model: str | Path | Mapping[str, Any] | Recipe, out: Path, terms: Terms, *,
    vocab: str = "strict", threads: int | None = None, overwrite: bool = False, force: bool = False,
    search: Sequence[Path] = (), progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractReport:  # fmt: skip
    """As `extract`, of terms that were read; `search`: where relative names in a `Recipe` are looked up."""
    said: list[str] = []

    def note(line: str) -> None:
        said.append(line)
        if say:
            say(line)

    with planned(base, model, terms, vocab=vocab, threads=threads, force=force, search=search) as plan:
        for line in plan.notes:
            note(line)
        inputs = [file.path for one in (plan.base, plan.model) for file in one.read_files]
        with open_brief_stage(out, identity={"extract": FORMAT}, overwrite=overwrite, inputs=inputs, say=note) as stage:
            began = time.perf_counter()
            with Spool(stage.root) as spool:
                found = run(plan, spool, progress=progress)
                report = _write(plan, found, spool, stage.path, out, note)
            stage.publish()
            seconds = time.perf_counter() - began
    return ExtractReport(**report, seconds=seconds, peak_rss_bytes=peak_rss(), notes=tuple(said))


def recipe_in(model: str | Path | Mapping[str, Any] | Recipe) -> Recipe | None:
    """The recipe that a model is; None where it is another kind of model."""
    if isinstance(model, Recipe):
        return model
    if isinstance(model, Mapping) or (str(model).endswith(SUFFIXES) and Path(model).is_file()):
        return read_recipe(model)
    return None


@contextmanager
def planned(
    base: str | Path | None, model: str | Path | Mapping[str, Any] | Recipe, terms: Terms, *, vocab: str = "strict",
    threads: int | None = None, force: bool = False, search: Sequence[Path] = (),
) -> Iterator[ExtractPlan]:  # fmt: skip
    """The plan of an extraction: see `open_plan`; a recipe may be data."""
    recipe = recipe_in(model)
    if base is None:
        if recipe is None or recipe.base_model is None:
            raise PlanError("the base is missing: only a recipe with a base_model names it")
        base, search = recipe.base_model, (*search, *search_path(model))
    found = recipe if isinstance(model, Mapping) else model
    assert found is not None and not isinstance(found, Mapping)
    with open_plan(
        base, found, terms, vocab=vocab, threads=threads, force=force, search=tuple(search), recipe=recipe
    ) as plan:
        yield plan


def _write(
    plan: ExtractPlan, found: Extracted, spool: Spool, folder: Path, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Both files and the card -> the report's fields."""
    modules = [one for one in found.modules if one.rank]
    # PEFT takes every module whose name ends as one that is saved: of a kind all are there, or none.
    changed = {one.kind for one, whole in found.saved if one.module is not None and whole.square != 0}
    saved = [one for one, whole in found.saved if (one.kind in changed if one.module else whole.square != 0)]
    if not modules:
        rest = "" if not saved else ": only tensors that are not matrices differ, and an adapter consists of matrices"
        raise PlanError(f"{plan.model.ref} has the same weights as {plan.base.ref}{rest}; there is nothing to extract")
    for line in _late_notes(plan, found, modules, saved):
        say(line)
    names = {tensor.removesuffix(".weight") for tensor in _module_names(plan)}
    config = adapters.config_of(
        modules, saved, names=names, base=plan.base.ref.partition("@")[0] if plan.base.revision else plan.base.ref,
        revision=plan.base.revision, config=plan.config, tied=_is_tied(plan.facts),
    )  # fmt: skip
    size = adapters.write(
        folder, modules, saved, spool, Reader(plan.model.ref), dtype=plan.terms.dtype, config=config,
        metadata={"tool": f"darekit {__version__}"},
    )  # fmt: skip
    fields: dict[str, Any] = {
        "output": str(out),
        "bytes": size,
        "model_bytes": plan.model_bytes,
        "rank": max(one.rank for one in modules),
        "modules": tuple(map(_module_report, found.modules)),
        "tensors": _tensor_reports(found, saved),
    }
    report = ExtractReport(**fields, seconds=0.0, peak_rss_bytes=0)
    beside = [one.companions for one in (plan.base, plan.model)]
    card = adapter_card(report, plan, license=agreed_license(beside))
    (folder / CARD).write_text(card, encoding="utf-8")
    return fields


def _module_names(plan: ExtractPlan) -> Iterator[str]:
    """All names that PEFT could take for a module."""
    for name, memory in plan.facts.canonicals([tensor.name for tensor in plan.alignment.tensors]).items():
        yield plan.facts.in_memory(plan.facts.without_prefix(memory)) if plan.terms.server is None else name


def _is_tied(facts: Facts) -> bool:
    return facts.is_tied or bool(facts.says_tied)


def _late_notes(plan: ExtractPlan, found: Extracted, modules: list[Module], saved: list[Saved]) -> Iterator[str]:
    """What is known only now."""
    same = [one.target.name for one in found.modules if not one.rank]
    if same:
        yield f"fine-tuning did not change {len(same)} modules ({same[0]}{', ...' if same[1:] else ''}): left out"
    terms, rank = plan.terms, max(one.rank for one in modules)
    if terms.share is not None:
        over = [one for one in modules if one.lost > (1 - terms.share) * one.square * (1 + 1e-6) + 1e-10 * one.square]
        if over:
            why = f"rank {terms.max_rank}" if terms.max_rank else f"rounding to {plan.terms.to_data()['dtype']}"
            yield f"{len(over)} modules lose more than was asked for: {why} does not allow more"
    if terms.server == "vllm":
        fits = next(choice for choice in VLLM_RANKS if choice >= rank)
        yield f"start vLLM with --enable-lora --max-lora-rank {fits}"
    elif saved:
        kinds = " and ".join(dict.fromkeys(one.kind for one in saved))
        yield f"{len(saved)} tensors ({kinds}) are saved whole: PEFT loads them, vLLM does not"


def _module_report(one: Module) -> ModuleReport:
    tensor = one.target.tensors[0]
    return ModuleReport(
        tensor.name, one.target.name, one.target.shape, one.target.count, one.rank, math.sqrt(one.square),
        _share(one.lost, one.square), tensor.group,
    )  # fmt: skip


def _tensor_reports(found: Extracted, saved: Collection[Saved]) -> tuple[TensorReport, ...]:
    kept = {one.tensor.name for one in saved}
    reports = {
        one.tensor.name: TensorReport(
            one.tensor.name, one.kind, math.prod(one.tensor.shape), _norm(whole.square), True,
            "" if one.tensor.name in kept else "as the base has it",
        )
        for one, whole in reversed(found.saved)  # of one that others share, the first entry is its own
    }  # fmt: skip
    return (*reversed(reports.values()), *(
        TensorReport(one.tensor.name, one.kind, math.prod(one.tensor.shape), _norm(whole.square), False, one.why)
        for one, whole in found.left_out
    ))  # fmt: skip


def _norm(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)


def _share(lost: float, square: float) -> float:
    return math.sqrt(lost / square) if square else 0.0
