# SPDX-License-Identifier: Apache-2.0
"""What a person sees first: verdicts before tables, rows by kind of tensor, bars over the layers, one screen."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import families
from darekit.architectures.depth import layer_of
from darekit.architectures.groups import group_of
from darekit.cli import tables
from darekit.cli.tables import Sized, kind_of

LAYERS = 32


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A narrow Llama with as many layers as a 7B model, and three models: rising over depth, frozen below, even."""
    path = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(0)
    base = families.llama(rng, layers=LAYERS)
    families.save(path / "base", base, families.config(layers=LAYERS))
    shared = {name: rng.normal(0, 1, array.shape) for name, array in base.items()}
    for model in ("rising", "frozen", "against"):
        tensors = {}
        for name, array in base.items():
            layer = found.index if (found := layer_of(name)) else 0
            scale = {"rising": 1e-3 + 2e-4 * layer, "frozen": 2e-3 * (layer >= 8), "against": -2e-3}[model]
            noise = rng.normal(0, 1, array.shape)
            if "down_proj" in name and model != "frozen":
                noise = shared[name]
            tensors[name] = (array.astype(np.float64) + scale * noise).astype(ml_dtypes.bfloat16)
        families.save(path / model, tensors, families.config(layers=LAYERS))
    return path


@pytest.mark.parametrize("width", [80, 100, 120])
def test_one_model_of_many_layers_fits_one_screen(deep, dare, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = dare("inspect", deep / "base", deep / "rising").out.splitlines()
    assert lines[0].startswith("ok: base looks like the base of rising")
    assert 20 <= len(lines) <= 40 and max(len(line) for line in lines if "/" not in line) <= width
    kinds = {line.split()[0] for line in lines if "%" in line}
    assert {"embeddings", "norms", "heads", "all", "mlp.up_proj"} <= kinds
    assert {f"self_attn.{x}_proj" for x in "qkvo"} <= kinds
    bars = {line.split()[0]: line.split()[-1] for line in lines if line.startswith(("mlp", "self"))}
    assert len(bars) == 7 and all(len(bar) in (16, 32) for bar in bars.values())
    for bar in bars.values():  # r rises sevenfold from the first layer to the last
        quarter = len(bar) // 4
        assert max(bar[:quarter]) < min(bar[-quarter:]) and "█" in bar[-quarter:] and bar[0] in "▁▂"


def test_frozen_layers_are_named_and_drawn(deep, dare):
    text = dare("inspect", deep / "base", deep / "frozen").out
    assert "unchanged   embeddings, heads, layers 0-7\n" in text
    row = next(line for line in text.splitlines() if line.startswith("mlp.up_proj"))
    assert row.split()[-1].startswith("·" * 8) and row.count("·") == 8


def test_every_tensor_still_has_a_row(deep, dare):
    found = dare("inspect", deep / "base", deep / "rising", "--tensors").out.splitlines()
    data = dare("inspect", deep / "base", deep / "rising", "--json").data
    rows = [line.split() for line in found]
    for tensor in (*data["tensors"], data["total"]):
        (row,) = [row for row in rows if row and row[0] == tensor["name"]]
        assert f"{tensor['r']:.4f}" in row and f"{tensor['deciles'][10]:.1e}" in row
    assert found[0].startswith("ok: ")


@pytest.mark.parametrize("width", [80, 120])
def test_several_models_first_say_who_fights_and_where(deep, dare, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    models = [deep / name for name in ("rising", "frozen", "against")]
    text = dare("inspect", deep / "base", *models).out
    lines = text.splitlines()
    assert lines[0].startswith("ok: base looks like the base of all 3 models") and len(lines) <= 42
    assert max(map(len, lines)) <= width
    flat = " ".join(text.split())
    assert "against rising and against: cosine -0." in flat and "most in mlp.down_proj (-1.00)" in flat
    assert "independent 2 of 3 pairs" in flat
    assert [line[:6] for line in lines if " & " in line[:6] and "cosine" not in line] == ["A & B ", "A & C ", "B & C "]
    data = dare("inspect", deep / "base", *models, "--json").data
    assert f"{data['interference']['pairs'][1]['cosine']:.3f}" in flat


def test_without_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    from darekit.cli import display

    monkeypatch.setattr(display, "LINES_EVERY", 0.0)
    with display.progress_bar("sweeping", quiet=False, unit="evaluations") as progress:
        for done in (0, 1, 1, 3, 4):  # nothing of the beginning, of the end, and of what was said
            progress(done, 4)
    lines = capsys.readouterr().err.splitlines()
    first, second = lines  # the first took whatever it took to open models
    assert first == "sweeping: 1 of 4 evaluations" and second.startswith("sweeping: 3 of 4 evaluations, about 0.")
    monkeypatch.setattr(display, "LINES_EVERY", 30.0)
    with display.progress_bar("merging", quiet=False) as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""  # what is short says nothing


def status(phase, done, total, seconds=0.0, **more):
    """What a search's watcher is told; `seconds`: of what has just been judged."""
    from darekit.searches.folders import BASELINE, TRIAL, Line
    from darekit.searches.working import Status

    scores = {"a": {"value": 0.5, "stderr": None, "higher_is_better": True, "items": 4}}
    trial = phase == "search"
    who = (TRIAL, done - 1, None) if trial else (BASELINE, None, "base")
    fresh = Line(*who, "complete", {}, {}, scores=scores, seconds=seconds)
    best = replace(fresh, trial=0) if trial else None
    return Status(phase, done, total, (), best, "a", None if more.pop("begin", False) else fresh, **more)


def test_the_time_left_is_said_once_it_is_known(capsys, monkeypatch):
    """Opening models and judging baselines took 100 s, the first candidate 50 s, and the next ones 2 s each."""
    from darekit.cli import display_search

    now = [1000.0]
    monkeypatch.setattr(display_search.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(display_search, "LINES_EVERY", 0.0)
    watch = display_search._Lines()
    told = []
    for after, one in (
        (0, status("baselines", 0, 2, begin=True)), (90, status("baselines", 1, 2, 90)),
        (10, status("baselines", 2, 2, 10)),
        (1, status("search", 0, 60, begin=True)), (0, status("search", 1, 60)), (50, status("search", 2, 60, 50.0)),
        *((2, status("search", done, 60, 2.0)) for done in range(3, 8)),
        (2, status("search", 8, 60, 2.0, seconds_left=9.0)),
    ):  # fmt: skip
        now[0] += after
        watch(one)
        told += capsys.readouterr().err.splitlines()
    left = [line.partition(", about ")[2] for line in told if line[0].isdigit() and "trial" in line]
    assert left == ["", "", "", "", "1 min 50 s left", "1 min 48 s left", "1 min 46 s left", "9.00 s left"]
    assert "searching: 60 candidates" in told


def test_the_first_of_several_workers_are_left_out_of_the_time_left():
    from darekit.cli.pace import Pace

    pace = Pace(begun=20, first=3, enough=3)
    found = []
    for done, now in ((21, 60), (22, 61), (23, 62), (24, 70), (25, 71), (26, 72), (26, 74)):
        pace.note(done, now)
        found.append(pace.left(60 - done, now))
    assert found[:5] == [None] * 5 and found[5] == pytest.approx(34 * 10 / 3)
    assert found[6] == pytest.approx(34 * 10 / 3 - 2) and pace.left(0, 80) is None and pace.left(34, 1e9) is None


def test_groups_that_are_kept_dense_as_a_rule_need_not_be_there(llamas, dare, tmp_path):
    assert dare("recommend", llamas.path / "base", llamas.path / "m0", "--out", tmp_path / "r.yaml").code == 0
    shown = dare("merge", tmp_path / "r.yaml", tmp_path / "out", "--dry-run")
    assert "keep_dense norms: " in shown.out and "biases" not in shown.out + shown.err


def test_many_pairs_are_counted_and_not_listed(llamas, dare, tmp_path):
    rng = np.random.default_rng(3)
    for k in range(5):
        families.save(tmp_path / f"x{k}", families.tuned(rng, llamas.base), families.config())
    text = dare("inspect", llamas.path / "base", *(tmp_path / f"x{k}" for k in range(5))).out
    assert "10 of 10 pairs" in text and "4 more pairs have smaller cosines" in text and len(text.splitlines()) <= 50


def test_bars_are_ascii_where_the_encoding_has_no_blocks(deep, dare, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "argv", ["dare", "inspect", str(deep / "base"), str(deep / "frozen")])
    from darekit import cli

    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown.flush()
    text = shown.buffer.getvalue().decode("ascii")
    assert not stop.value.code and tables.shown("1 ± 2") == "1 +- 2"
    row = next(line for line in text.splitlines() if line.startswith("mlp.up_proj"))
    assert row.split()[-1].startswith("_" * 8) and row.rstrip().endswith("#")


@pytest.mark.parametrize(
    ("name", "shape", "kind", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", (8, 8), "self_attn.q_proj", 11),
        ("model.layers.3.input_layernorm.weight", (8,), "norms", 3),
        ("model.layers.3.self_attn.q_proj.bias", (8,), "biases", 3),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", (8, 8), "block_sparse_moe.experts.w1", 3),
        ("model.layers.3.mlp.experts.12.down_proj.weight", (8, 8), "mlp.experts.down_proj", 3),
        ("transformer.h.5.attn.c_attn.weight", (8, 24), "attn.c_attn", 5),
        ("h.5.mlp.c_fc.weight", (8, 32), "mlp.c_fc", 5),
        ("wte.weight", (96, 8), "embeddings", None),
        ("bert.encoder.layer.2.attention.self.query.weight", (8, 8), "attention.self.query", 2),
        ("bert.pooler.dense.weight", (8, 8), "bert.pooler.dense", None),
        ("gpt_neox.layers.4.attention.query_key_value.weight", (24, 8), "attention.query_key_value", 4),
        ("embed_out.weight", (96, 8), "heads", None),
        ("vit.encoder.layer.1.intermediate.dense.weight", (8, 8), "intermediate.dense", 1),
        ("blocks.6.attn.qkv.weight", (24, 8), "attn.qkv", 6),
        ("vit.embeddings.patch_embeddings.projection.weight", (8, 3, 4, 4), "embeddings", None),
        ("classifier.2.weight", (3, 8), "heads", None),
        ("lm_head.weight", (96, 8), "heads", None),
        ("visual.merger.mlp.0.weight", (8, 8), "visual.merger.mlp", None),
        ("layers.3.weight", (8, 8), "layers", 3),
        ("0.weight", (8, 8), "0.weight", None),
    ],
)
def test_kinds(name, shape, kind, layer):
    found, where = kind_of(name, group_of(name, shape))
    assert (found, where.index if where else None) == (kind, layer)


def sized(name, *shape):
    return Sized(name, shape, int(np.prod(shape)), group_of(name, shape))


def test_two_stacks_stay_apart_where_their_kinds_have_one_name():
    t5 = [sized(f"{side}.block.{i}.layer.0.SelfAttention.q.weight", 8, 8) for side in ("encoder", "decoder")
          for i in range(3)]  # fmt: skip
    t5 += [sized(f"decoder.block.{i}.layer.1.EncDecAttention.q.weight", 8, 8) for i in range(3)]
    kinds = {kind.name: kind for kind in tables.kinds_of(t5)}
    assert set(kinds) == {"encoder layer.SelfAttention.q", "decoder layer.SelfAttention.q", "layer.EncDecAttention.q"}
    assert all(list(kind.by_layer()) == [0, 1, 2] for kind in kinds.values())
    seeing = [sized(f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight", 4, 4) for i in range(2)]
    seeing += [sized(f"language_model.model.layers.{i}.self_attn.q_proj.weight", 8, 8) for i in range(4)]
    assert [kind.name for kind in tables.kinds_of(seeing)] == [
        "vision_tower self_attn.q_proj", "language_model self_attn.q_proj"
    ]  # fmt: skip
    assert list(tables.whole(seeing).by_layer()) == [0, 1, 2, 3]  # of the larger stack


def test_many_kinds_share_the_last_row_and_lose_no_parameter():
    tensors = [sized(f"layers.0.part_{chr(97 + i)}.weight", 8, 8 + i) for i in range(26)]
    kinds = tables.kinds_of(tensors, rows=10)
    assert len(kinds) == 10 and kinds[-1].name == "other (17 kinds)"
    assert sum(kind.parameters for kind in kinds) == sum(tensor.parameters for tensor in tensors)


def test_names_in_brackets_are_no_markup(dare, llamas, tmp_path):
    families.copy(llamas.path / "m0", tmp_path / "m[bold]0")
    text = dare("inspect", llamas.path / "base", tmp_path / "m[bold]0", llamas.path / "m1").out
    assert text.count("m[bold]0") >= 2


def test_a_table_that_is_too_wide_is_cut_into_several():
    heads, rows = ["layer", *(f"curve {i}" for i in range(9))], [["1", *["0.1234 ± 0.0001"] * 9]]
    parts = [*tables.side_by_side(heads, rows)]
    assert len(parts) > 1 and all(part.columns[0].header == "layer" for part in parts)
    assert [column.header for part in parts for column in part.columns[1:]] == heads[1:]


@pytest.mark.parametrize("command", ["merge", "drop"])
def test_a_dry_run_says_so_first_and_a_run_says_what_it_wrote(dare, llamas, tmp_path, command):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(families.recipe(llamas.path)))
    words = {"merge": (recipe, tmp_path / "out"),
             "drop": (llamas.path / "base", llamas.path / "m0", tmp_path / "out", "-p", "0.5")}[command]  # fmt: skip
    assert dare(command, *words, "--dry-run").out.startswith("Dry run, nothing is written: task_arithmetic of ")
    assert dare(command, *words).out.startswith(f"Wrote {tmp_path / 'out'}: ")


def test_automatic_rates_are_shown_by_kind(dare, deep, tmp_path):
    text = dare("drop", deep / "base", deep / "rising", tmp_path / "out", "-p", "auto", "--dry-run").out
    row = next(line for line in text.splitlines() if line.startswith("mlp.up_proj"))
    assert 0.5 < float(row.split()[3]) < 1 and row.split()[-1][0] < "▄" and len(text.splitlines()) <= 40


def test_a_name_that_the_terminal_cannot_show_stops_nothing(llamas, tmp_path):
    families.copy(llamas.path / "m0", tmp_path / "mödel")
    command = [sys.executable, "-m", "darekit", "inspect", str(llamas.path / "base"), str(tmp_path / "mödel")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("ok: base looks like the base of m?del")


def test_bars_have_the_head_that_is_asked_for():
    course = {0: 1.0, 1: 0.5}
    table, room = tables.with_bars(("model",), [("a",)], [course], 2, what="r, ")
    assert room and table.columns[-1].header == "r, layers 0-1"
    table, _ = tables.with_bars(("model",), [("a",)], [course], 2, title="1 - cosine")
    assert table.columns[-1].header == "1 - cosine"


def test_no_drop_rate_is_rounded_up(deep, dare):
    """A rate that is read off a screen may be used: it never moves an output by more than was asked."""
    found = dare("inspect", deep / "base", deep / "rising", "--json").data
    rates = {tensor["name"]: tensor["p_max"] for tensor in found["tensors"]}
    lines = [line.split() for line in dare("inspect", deep / "base", deep / "rising", "--tensors").out.splitlines()]
    column = next(line for line in lines if "p_max" in line).index("p_max")
    shown = {line[0]: float(line[column]) for line in lines if line and line[0] in rates}
    assert len(shown) == len(rates) > 200
    assert all(0 <= rates[name] - rate < 1e-4 + 1e-9 for name, rate in shown.items())
    assert (tables.floored(0.95796, 3), tables.floored(0.9, 3), tables.floored(None, 3)) == ("0.957", "0.900", "")
