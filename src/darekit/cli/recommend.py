# SPDX-License-Identifier: Apache-2.0
"""`dare recommend`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from darekit.cli.options import HeadsOf, Json, Seed, Threads, Vocab, check_fraction, errors_told

if TYPE_CHECKING:
    from darekit.recommendation.advice import Recommendation


def recommend(
    base: Annotated[str, typer.Argument(help="The checkpoint that MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    tau: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            help="How far a layer's output may move, relative to itself; default 0.2, with --data 0.1.",
        ),
    ] = None,
    drop_rate: Annotated[
        float | None, typer.Option("-p", "--drop-rate", help="Judge this rate, instead of what tau allows.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Keep this fraction of what may be dropped, where it hurts least: 0.05 for 5 %."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="JSON lines (or a data set) of text to run MODEL on; needs torch.")
    ] = None,
    search_q: Annotated[
        bool,
        typer.Option(
            "--search-q", help="With --data of prompts and completions: search DAREx's q = k (1 - p) by outputs."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write a recipe with these drop rates: RECIPE.yaml.")] = None,
    keep_dense: Annotated[
        list[str] | None,
        typer.Option(help="Do not drop these; default: embeddings, norms and biases; none: drop everything."),
    ] = None,
    seed: Seed = None,
    vocab: Annotated[Vocab, typer.Option(help="Vocabularies that differ: refuse, cut, or keep.")] = Vocab.STRICT,
    heads: Annotated[
        HeadsOf | None, typer.Option(help="Take heads (classifiers, lm_head) from one of the two as they are.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows of --data.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of one row.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="What MODEL computes in; default: float32 on a CPU.")] = None,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Say how much of MODEL may be dropped, tensor by tensor, what that is predicted to do, and write a recipe."""
    if drop_rate is not None:
        check_fraction(drop_rate, "-p")
        if budget is not None:
            raise typer.BadParameter("a drop rate and a budget both say how much; give one", param_hint="--budget")
    check_fraction(budget or 0.0, "--budget")
    if search_q and data is None:
        raise typer.BadParameter("the search compares outputs on text: add --data FILE", param_hint="--search-q")
    with errors_told():
        from darekit.architectures.groups import ONE_TERM
        from darekit.cli import display
        from darekit.recommendation import advice

        if out is not None:  # before anything long
            advice.check_out(out, overwrite=overwrite)
        dense = ONE_TERM if keep_dense is None else tuple(p for p in keep_dense if p != "none")
        with ExitStack() as bars:

            def step(what: str) -> Callable[[int, int], None] | None:
                bars.close()
                unit = {"running the model": "rows", "searching q": "runs"}.get(what)
                return bars.enter_context(display.progress_bar(what, quiet=as_json, unit=unit))

            found = advice.recommend(
                base, model, tau=tau, drop_rate=drop_rate, budget=budget, data=data, search_q=search_q,
                keep_dense=dense, seed=seed, vocab=vocab.value, heads=heads.value if heads else None, limit=limit,
                batch_size=batch_size, max_length=max_length, device=device, dtype=dtype, threads=threads,
                progress=step,
            )  # fmt: skip
        said, stopped = ([], False) if out is None else advice.write_recipe(found, out, overwrite=overwrite)
        if as_json:
            data_out = found.to_data() | {"out": str(out) if out else None, "checks": said}
            print(json.dumps(data_out))
            return
        _show(found)
        if out is not None:
            for line in said:
                print(f"note: dare merge will say: {line}")
            print(f"{out}: the recipe; dare merge {out} OUT{' --force' if stopped else ''}")


def _show(found: Recommendation) -> None:
    """A row for each tensor that may be dropped, what stays dense and why, and what it comes to."""
    from rich.table import Table

    from darekit.cli.display import count_of, print_table

    calibrated = found.calibration is not None
    more = ("kappa", "noise/signal") if calibrated else ()
    table = Table("tensor", "parameters", "r", "p_max", "drop rate", "rho", *more, box=None, pad_edge=False)
    for tensor in found.tensors:
        seen = [f"{value:.3g}" if value is not None else "" for value in (tensor.kappa, tensor.noise_to_signal)]
        table.add_row(
            tensor.name, count_of(tensor.parameters), f"{tensor.r:.4f}", f"{tensor.p_max:.4f}",
            f"{tensor.drop_rate:.4f}", f"{tensor.rho:.3f}", *(seen if calibrated else ()),
        )  # fmt: skip
    print_table(table)
    reasons: dict[str, list[str]] = {}
    for dense in found.dense:
        reasons.setdefault(dense.reason, []).append(dense.name)
    for reason, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        print(f"dense: {shown} ({reason})")
    median, largest = found.rho
    print(
        f"\ndrop rate {found.drop_rate:.4g}: the median of p_max over the {count_of(found.droppable)} parameters that "
        f"may be dropped (of {count_of(found.parameters)})"
    )
    how = "by tensor" if found.asked is None else f"at p = {found.asked:g}"
    how = how if found.budget is None else f"budget {found.budget:g}"
    print(
        f"{how}: {count_of(found.kept)} elements stay ({100 * found.kept / max(1, found.parameters):.3g} %), predicted "
        f"perturbation of a layer's output {median:.3g} (median), {largest:.3g} (largest)"
    )
    if found.search is not None:
        print(f"q = {found.search.best:g} (1 - p): the {found.search.measure} from the fine-tuned model's outputs is")
        tried = sorted(found.search.changes.items())
        print("  " + ", ".join(f"{change:.4g} at k = {k:g}" for k, change in tried))
    print(found.assumed)
    if found.verdict != "ok":
        print(f"{found.verdict}: {found.words}")
    for note in found.notes:
        print(f"note: {note}")
