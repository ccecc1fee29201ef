# SPDX-License-Identifier: Apache-2.0
"""`dare eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from darekit.cli.options import Device, Dtype, GpusPerWorker, Jobs, Json, Ray, errors_told

if TYPE_CHECKING:
    from darekit.evaluation.comparison import Comparison


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model directories, Hub ids, recipes (.yaml) or packs.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="lm-eval tasks: gsm8k,MATH,humaneval,mbpp,glue or local ones."),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="JSON Lines file to judge by; may be repeated.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Python function to judge by; it gets the live model."),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Command to judge by; it gets a model directory and prints JSON."),
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help="The checkpoint the packs were made from.")] = None,
    include: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Folder with local task files; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Questions per task and rows per file.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Examples shown before each question of a task.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put the tasks' questions into the chat template.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rows or questions per batch.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, metavar="N", help="Tokens per row of --data.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    samples: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the result of each row and question.")
    ] = None,
    generate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer the instructions in this file, for AlpacaEval.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="With --generate: a text with {instruction} in it, instead of the chat template."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --generate: the longest answer, in tokens.")
    ] = 512,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Allow tasks that execute code written by the models.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder for results; finished models are not run again. With --generate: a folder or a .json file.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --generate: replace existing answers.")] = False,
    jobs: Jobs = None,
    ray: Ray = None,
    gpus_per_worker: GpusPerWorker = None,
    as_json: Json = False,
) -> None:
    """Evaluate MODELS (recipes are merged in memory) and print one table with standard errors."""
    judged = bool(tasks or data or judge or command)
    if generate is None and not judged:
        raise typer.BadParameter("choose what to judge by: --tasks, --data, --judge or --command", param_hint="MODELS")
    if generate is not None and judged:
        raise typer.BadParameter(
            "cannot be combined with --tasks, --data, --judge or --command", param_hint="--generate"
        )
    if generate is not None and out is None:
        raise typer.BadParameter("needs --out FILE.json, or a folder for several models", param_hint="--generate")
    if generate is not None and (jobs is not None or ray is not None):
        raise typer.BadParameter("cannot be combined with --jobs or --ray", param_hint="--generate")
    for given, name in ((prompt is not None, "--prompt"), (overwrite, "--overwrite")):
        if given and generate is None:
            raise typer.BadParameter("only works with --generate", param_hint=name)
    with errors_told():
        from darekit.cli import display

        if generate is not None:
            from darekit.evaluation.generations import generate as write_answers

            with display.progress_bar("answering", quiet=as_json, unit="answers") as progress:
                paths = write_answers(
                    models, generate, out or Path(), base=base, prompt=prompt, max_new_tokens=max_new_tokens,
                    batch_size=batch_size, limit=limit, overwrite=overwrite, device=device, dtype=dtype,
                    progress=progress, say=display.say_note,
                )  # fmt: skip
            print(json.dumps({"files": [str(path) for path in paths]}) if as_json else "\n".join(map(str, paths)))
            return
        from darekit.evaluation.comparison import evaluate as judge_models

        with display.progress_bar("judging", quiet=as_json or not data, unit="rows") as progress:
            found = judge_models(
                models, judge=_spec(judge, command), tasks=tasks or (), data=data or (), base=base,
                include=include or (), limit=limit, batch_size=batch_size, max_length=max_length,
                num_fewshot=num_fewshot, chat_template=chat_template, trust_code=trust_code, device=device,
                dtype=dtype, samples=samples, out=out, jobs=jobs, ray=ray,
                gpus_per_worker=gpus_per_worker, confirm=_confirm, progress=progress,
                show_bars=bool(tasks) and not as_json and progress is None and sys.stderr.isatty(),
                say=display.say_note,
            )  # fmt: skip
        _show(found, as_json=as_json)
    if found.failed:
        raise typer.Exit(1)


def _spec(judge: str | None, command: str | None) -> Any:
    """What --judge and --command say, as one judge."""
    if judge and command:
        return {"judge": {"python": judge}, "command": {"command": command}}
    return {"python": judge} if judge else {"command": command} if command else None


def _confirm(names: Sequence[str]) -> bool:
    """Ask a person; nobody there means no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(
        f"{', '.join(names)} runs code written by the models, with your permissions on this machine. Continue?",
        err=True,
    )


def _show_differences(found: Comparison) -> None:
    """How far the other models are from the first, where errors are known."""
    from darekit.cli import display, tables

    differences = found.differences()
    able = [name for name, one in differences.items() if any(error is not None for _, error in one.values())]
    if not able:
        return
    models = [evaluation.model for evaluation in found.evaluations[1:] if evaluation.error is None]

    def cell(name: str, model: str) -> str:
        value, error = differences[name].get(model, (0.0, None))
        return "" if error is None else f"{value:+.4f} ± {error:.4f}"

    rows = [(model, *(cell(name, model) for name in able)) for model in models]
    for part in tables.side_by_side((f"against {found.evaluations[0].model}", *able), rows):
        display.print_table(part)
        print()


def _show(found: Comparison, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_data()))
        return
    from darekit.cli import display, tables
    from darekit.evaluation.comparison import best_of, shown

    models = [evaluation.model for evaluation in found.evaluations]
    marked = False
    rows = []
    for name in found.names:
        row = found.row(name)
        best = best_of(row)
        marked |= best is not None
        rows.append((name, *(shown(score) + (" *" if at == best else "  ") for at, score in enumerate(row))))
    # A score in each row; where many models make that too wide, a model in each row.
    wide = sum(max(len(line[i]) for line in (("", *models), *rows)) + tables.SPACE for i in range(len(models) + 1))
    heads: tuple[str, ...] = ("", *models)
    if wide - tables.SPACE > tables.columns():
        heads, rows = (
            ("", *found.names),
            [tuple(cells) for cells in zip(models, *(row[1:] for row in rows), strict=True)],
        )
    for part in tables.side_by_side([head if head == "" else f"{head}  " for head in heads], rows):
        display.print_table(part)
        print()
    _show_differences(found)
    if marked:
        print("* best: ahead of every other by more than twice the standard error of the difference")
    elif len(found.evaluations) > 1:
        print(
            "no model is marked best: none is ahead of every other by more than twice the standard error of the "
            "difference"
        )
