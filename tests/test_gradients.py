# SPDX-License-Identifier: Apache-2.0
"""What holds for each tensor: gradients over depth, layers by name, precedence, and what the plan keeps of it."""

from __future__ import annotations

import json
from typing import Annotated

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import darekit as dk
import families
from darekit.architectures.depth import LAYER_WORDS, depths_of, layer_of
from darekit.checkpoints import ArrayBytes, Checkpoint, TensorInfo
from darekit.errors import PlanError, RecipeError
from darekit.methods import MERGE_METHODS, MergeMethod, Number
from darekit.output.lock import resolved_parameters
from darekit.planning.opening import open_plan
from darekit.planning.plan import make_plan
from darekit.recipe import Filtered, Filters, Gradient, Place, read_recipe, resolve
from darekit.recipe.values import chained, mapped

LAYERS = 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A family with five layers."""
    path = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(5)
    base = families.llama(rng, layers=LAYERS)
    families.save(path / "base", base, families.config(layers=LAYERS))
    for i in range(2):
        families.save(path / f"m{i}", families.tuned(rng, base), families.config(layers=LAYERS))
    return path


# --- the value


@pytest.mark.parametrize(
    ("anchors", "values"),
    [
        # mergekit's rule by hand, at the depths 0, 1/4, 1/2, 3/4, 1 of five layers.
        ((0, 1), (0, 0.25, 0.5, 0.75, 1)),
        ((0, 0.5, 1), (0, 0.25, 0.5, 0.75, 1)),
        ((1, 0.7, 0.1), (1, 0.85, 0.7, 0.4, 0.1)),
        ((0.3,), (0.3,) * 5),
        ((0, 0.3, 0.5, 0.7, 1), (0, 0.3, 0.5, 0.7, 1)),
        ((1, 0, 0, 1), (1, 0.25, 0, 0.25, 1)),
        ((2, -2, 2, -2, 2, -2, 2), (2, 0, -2, 0, 2)),
    ],
)
def test_a_gradient_by_hand(anchors, values):
    gradient = Gradient(tuple(map(float, anchors)))
    found = [gradient.at(Place("w", depth=i / 4)) for i in range(5)]
    assert found == pytest.approx(values, abs=1e-15)
    assert (found[0], found[4]) == (anchors[0], anchors[-1])


NUMBERS = st.floats(-1e6, 1e6)
GRADIENTS = st.lists(NUMBERS, min_size=1, max_size=6).map(lambda anchors: Gradient(tuple(anchors)))
DEPTHS = st.floats(0, 1)


@given(GRADIENTS, DEPTHS)
def test_a_gradient_is_linear_interpolation(gradient, depth):
    anchors = gradient.anchors
    wanted = np.interp(depth, np.linspace(0, 1, len(anchors)), anchors) if len(anchors) > 1 else anchors[0]
    scale = max(map(abs, anchors))
    assert gradient.at(Place("w", depth=depth)) == pytest.approx(wanted, abs=1e-12 * scale + 1e-300)
    assert min(anchors) <= gradient.at(Place("w", depth=depth)) <= max(anchors)


@given(GRADIENTS)
def test_a_gradient_meets_its_anchors(gradient):
    last = len(gradient.anchors) - 1
    for i, anchor in enumerate(gradient.anchors):
        found = gradient.at(Place("w", depth=i / last if last else 0.5))
        assert found == pytest.approx(anchor, abs=1e-12 * max(map(abs, gradient.anchors)) + 1e-300)


@given(NUMBERS, NUMBERS, DEPTHS, DEPTHS)
def test_a_gradient_is_monotone_between_anchors(left, right, one, other):
    gradient = Gradient((left, right))
    near, far = sorted((one, other))
    step = gradient.at(Place("w", depth=far)) - gradient.at(Place("w", depth=near))
    rounding = 1e-15 * max(abs(left), abs(right))
    assert step >= -rounding if right >= left else step <= rounding


@given(st.floats(0, 1), st.integers(1, 5), DEPTHS)
def test_equal_numbers_are_that_number(number, count, depth):
    """Without a bit of rounding: a drop rate of 1 stays 1."""
    assert Gradient((number,) * count).at(Place("w", depth=depth)) == number


NAMES = st.text("ab.", min_size=1, max_size=4)
FILTERS = st.lists(st.builds(Filtered, NAMES | st.just("*"), NUMBERS | GRADIENTS), max_size=4).map(
    lambda entries: Filters(tuple(entries))
)
SCOPES = st.lists(st.none() | NUMBERS | GRADIENTS | FILTERS, max_size=4)


@given(SCOPES, NAMES, DEPTHS)
def test_scopes_resolve_by_the_first_that_matches(scopes, name, depth):
    """Written out: the first filter that is in the name or is `*` decides; a list without a match asks the next."""
    place = Place(name, (), depth)
    wanted = None
    for value in scopes:
        entries = [(e.filter, e.value) for e in value.entries] if isinstance(value, Filters) else [("*", value)]
        matching = [one for pattern, one in entries if (pattern == "*" or pattern in name) and one is not None]
        if matching:
            wanted = matching[0]
            break
    if isinstance(wanted, Gradient):
        wanted = wanted.at(place)
    assert resolve(scopes, place) == wanted
    assert resolve((chained(scopes),), place) == wanted  # as one value it says the same


@given(GRADIENTS | FILTERS | NUMBERS, NAMES, DEPTHS)
def test_doubling_what_is_written_doubles_what_holds(value, name, depth):
    place = Place(name, (), depth)
    before, after = resolve((value,), place), resolve((mapped(value, lambda number: 2 * number),), place)
    assert after == (None if before is None else 2 * before)


# --- layers by name


def test_which_number_counts_layers():
    """Names as the checkpoints of these families have them."""
    for name, stack, index in [
        ("model.layers.31.self_attn.q_proj.weight", "model.layers", 31),  # Llama, Qwen, Gemma, Phi, ...
        ("model.layers.3.mlp.experts.7.up_proj.weight", "model.layers", 3),  # Qwen3-MoE
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "model.layers", 3),  # Mixtral
        ("transformer.h.11.attn.c_attn.weight", "transformer.h", 11),  # GPT-2, Falcon, Exaone
        ("h.11.attn.c_attn.weight", "h", 11),
        ("gpt_neox.layers.5.attention.dense.bias", "gpt_neox.layers", 5),
        ("backbone.layers.5.mixer.A_log", "backbone.layers", 5),  # Mamba
        ("transformer.encoder.layers.27.mlp.dense_h_to_4h.weight", "transformer.encoder.layers", 27),  # ChatGLM
        ("bert.encoder.layer.2.attention.self.query.weight", "bert.encoder.layer", 2),
        ("distilbert.transformer.layer.2.ffn.lin1.weight", "distilbert.transformer.layer", 2),
        ("encoder.block.4.layer.1.DenseReluDense.wi.weight", "encoder.block", 4),  # T5
        ("model.decoder.layers.4.encoder_attn.k_proj.weight", "model.decoder.layers", 4),  # Whisper, BART
        ("visual.blocks.9.attn.qkv.weight", "visual.blocks", 9),  # Qwen2-VL
        ("model.visual.deepstack_merger_list.2.norm.weight", "model.visual.deepstack_merger_list", 2),  # Qwen3-VL
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers", 0),
    ]:
        layer = layer_of(name)
        assert layer is not None and (layer.stack, layer.index) == (stack, index), name
    for name in (
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "visual.merger.mlp.0.weight", "wte.weight",
        "mm_projector.2.bias", "classifier.0.weight", "layers.weight", "path.3.weight", "encoder.layers.weight",
    ):  # fmt: skip
        assert layer_of(name) is None, name


def test_every_stack_counts_its_own_layers():
    names = [f"model.layers.{i}.mlp.experts.{e}.w1.weight" for i in range(5) for e in range(8)]
    names += [f"visual.blocks.{i}.mlp.fc1.weight" for i in range(3)] + ["model.embed_tokens.weight", "lm_head.weight"]
    depths = depths_of(names)
    assert depths.stacks == {"model.layers": 5, "visual.blocks": 3}
    assert [depths.at(f"model.layers.{i}.mlp.experts.7.w1.weight") for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [depths.at(f"visual.blocks.{i}.mlp.fc1.weight") for i in range(3)] == [0, 0.5, 1]
    assert depths.at("model.embed_tokens.weight") == depths.at("lm_head.weight") == 0  # before and after: first value

    t5 = depths_of([f"{side}.block.{i}.layer.{j}.w" for side, n in (("encoder", 2), ("decoder", 3)) for i in range(n)
                    for j in range(3)])  # fmt: skip
    assert t5.stacks == {"encoder.block": 2, "decoder.block": 3}
    assert (t5.at("encoder.block.1.layer.0.w"), t5.at("decoder.block.1.layer.0.w")) == (1.0, 0.5)


def test_one_layer_is_the_last():
    """As mergekit has it: a single layer takes the gradient's last value."""
    assert depths_of(["model.layers.0.w.weight", "model.norm.weight"]).of == {"model.layers.0.w.weight": 1.0}


def test_a_layer_for_further_tokens_is_no_layer():
    """GLM-4-MoE and DeepSeek store it under the number after the last layer's; configs do not count it."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)] + ["model.layers.3.eh_proj.weight"]
    depths = depths_of(names)
    assert depths.stacks == {"model.layers": 3}
    assert [depths.at(name) for name in names] == [0, 0.5, 1, 0, 0]


@given(st.integers(1, 200), st.sampled_from(LAYER_WORDS))
def test_depth_runs_from_0_to_1(count, word):
    depths = depths_of(f"model.{word}.{i}.w" for i in reversed(range(count)))
    assert [depths.at(f"model.{word}.{i}.w") for i in range(count)] == (
        [i / (count - 1) for i in range(count)] if count > 1 else [1.0]
    )


# --- what the plan keeps


def checkpoint(ref, shapes):
    infos = {
        name: TensorInfo(name, "F32", shape, ArrayBytes(np.full(4 * int(np.prod(shape)), 7, np.uint8)))
        for name, shape in shapes.items()
    }
    return Checkpoint(ref=ref, directory=None, tensors=infos, config=None, files=(), revision=None)


SHAPES = {f"h.{i}.{part}.weight": (4, 4) for i in range(3) for part in ("attn", "mlp")} | {"wte.weight": (8, 4)}


def planned(data, shapes=SHAPES, models=("a", "b")):
    recipe = read_recipe({"base_model": "base", "models": list(models), **data})
    return make_plan(recipe, checkpoint("base", shapes), [checkpoint(ref, shapes) for ref in models])


def test_settings_hold_every_number_of_a_tensor():
    plan = planned(
        {
            "models": [
                {"model": "a", "parameters": {"weight": [0, 1], "keep": [{"filter": "mlp", "value": [1, 0.5]}]}},
                {"model": "b", "parameters": {"drop_rate": {"filter": "attn", "value": [0.2, 0.4]}}},
            ],
            "sparsify": {"method": "dare", "drop_rate": [0.8, 0], "q": [0, 0.5], "keep_dense": ["embeddings"]},
            "merge_method": "ties",
            "parameters": {"keep": 0.9, "lambda": [1, 2, 1]},
        }
    )
    first, middle, last = (plan.settings[f"h.{i}.mlp.weight"] for i in range(3))
    assert [s.scale for s in (first, middle, last)] == [1, 2, 1]
    assert [s.models[0].weight for s in (first, middle, last)] == [0, 0.5, 1]
    assert [s.models[0].keep for s in (first, middle, last)] == [1, 0.75, 0.5]
    assert [s.models[0].rate for s in (first, middle, last)] == [0.8, 0.4, 0]
    assert [s.models[1].rate for s in (first, middle, last)] == [0.8, 0.4, 0]
    assert [plan.settings[f"h.{i}.attn.weight"].models[1].rate for i in range(3)] == pytest.approx([0.2, 0.3, 0.4])
    assert plan.settings["h.1.attn.weight"].models[0].keep == 0.9  # the list of filters falls through
    assert first.models[0].noise == pytest.approx(2) and last.models[0].noise == 0  # sqrt(p/(1-p)), nothing dropped
    assert middle.models[0].sparsify["q"] == 0.25
    embedding = plan.settings["wte.weight"].models[0]
    assert (embedding.rate, embedding.noise, embedding.sparsify) == (0, 0, {})
    # Steps and summaries say the same.
    steps = {step.name: step for step in plan.steps}
    assert steps["h.1.mlp.weight"].weights == (0.5, 1.0) and steps["h.1.mlp.weight"].factor == 2
    assert [spec.parameters for spec in steps["h.1.mlp.weight"].chains[0]] == [
        {"drop_rate": 0.4, "rescale": "paper", "q": 0.25}, {"keep_count": 12},
    ]  # fmt: skip
    assert plan.rate_of(1, plan.alignment.tensors[0])[0] == pytest.approx(0.2)
    dropped = 2 * 16 * (0.8 + 0.4 + 0)
    assert plan.summaries[0].kept == pytest.approx(plan.summaries[0].parameters - dropped, abs=6)


def test_equal_settings_are_one_object():
    """A plan of 47,000 tensors holds a few."""
    plan = planned({"sparsify": {"method": "dare", "drop_rate": [0.1, 0.9]}, "merge_method": "ties"})
    assert len({id(settings) for settings in plan.settings.values()}) == 3
    assert plan.settings["h.0.mlp.weight"] is plan.settings["wte.weight"]


def test_a_parameter_of_the_merge_may_differ_by_tensor(monkeypatch):
    """`t` of a method as mergekit's slerp has it: shared, without a default."""

    def blend(deltas, weights, *, t: Annotated[float, Number("how far", 0, 1, per_model=False)]):
        """Source: none."""

    monkeypatch.setitem(MERGE_METHODS, "blend", MergeMethod(blend))
    data = {"merge_method": "blend", "parameters": {"t": [{"filter": "attn", "value": [0, 1]}, {"value": 0.3}]}}
    plan = planned(data)
    steps = {step.name: step.parameters["t"] for step in plan.steps}
    assert steps == {
        "h.0.attn.weight": 0, "h.1.attn.weight": 0.5, "h.2.attn.weight": 1, "h.0.mlp.weight": 0.3,
        "h.1.mlp.weight": 0.3, "h.2.mlp.weight": 0.3, "wte.weight": 0.3,
    }  # fmt: skip
    assert [(group["parameters"], group["tensors"]) for group in resolved_parameters(plan)] == [
        ({"t": 0}, ["h.0.attn.weight"]),
        ({"t": 0.3}, ["h.0.mlp.weight", "h.1.mlp.weight", "h.2.mlp.weight", "wte.weight"]),
        ({"t": 0.5}, ["h.1.attn.weight"]),
        ({"t": 1}, ["h.2.attn.weight"]),
    ]
    assert "parameters" not in resolved_parameters(planned(data | {"parameters": {"t": 0.3}}))[0]
    with pytest.raises(RecipeError, match=r"no t for tensor h.0.mlp.weight: .*or set parameters.t"):
        planned({"merge_method": "blend", "parameters": {"t": {"filter": "attn", "value": 1}}})


def test_no_number_of_a_merge_method_is_asked_in_vain():
    """A model's own number must be in `ModelSettings`, or the recipe would take it and nobody read it."""
    own = {
        (name, parameter.name)
        for name, method in MERGE_METHODS.items()
        for parameter in method.parameters.values()
        if isinstance(parameter.kind, Number) and parameter.kind.per_model
    }
    assert {name for _, name in own} <= {"keep"}


def test_minimal_of_fisher_may_differ_by_tensor(deep, tmp_path):
    """A list of filters reached the engine as it was, before one resolver asked for it."""
    names = dict.fromkeys(f"model.layers.{i}.mlp.up_proj.weight" for i in range(LAYERS))
    tensors = {name: np.full((4, 4), 1.0, np.float32) for name in names}
    method = dk.merge_method("fisher", minimal=[{"filter": "layers.0.", "value": 1e9}, {"value": 0}])
    models = [tensors, {name: 3 * array for name, array in tensors.items()}]
    fishers = [{name: np.full((4, 4), f, np.float32) for name in names} for f in (3.0, 1.0)]
    merged = dk.merge_tensors(tensors, models, method=method, statistics=fishers)
    for name in names:
        wanted = 2.0 if "layers.0." in name else 1.5  # (1 + 3) / 2 where minimal drowns the Fishers, (3 + 3) / 4
        assert merged[name] == pytest.approx(np.full((4, 4), wanted), rel=1e-6), name


def test_a_trim_of_the_whole_model_takes_one_keep():
    data = {"merge_method": "ties", "parameters": {"trim": "model", "keep": [0.2, 0.8]}}
    with pytest.raises(
        PlanError, match=r"trim: model uses one threshold .* keep is 0.2 in some tensors and 0.8 in others"
    ):
        planned(data)
    for keep in ([0.2, 0.2], [{"filter": "wte", "value": 1}, {"value": 0.2}]):
        assert planned({**data, "parameters": {"trim": "model", "keep": keep}}).steps


def test_no_layers_is_said():
    data = {"merge_method": "task_arithmetic", "parameters": {"lambda": [0.5, 1]}}
    plan = planned(data, {"encoder.weight": (4, 4), "mlp.0.weight": (4, 4), "mlp.1.weight": (4, 4)})
    (note,) = [note for note in plan.notes if note.startswith("lambda")]
    assert "every tensor gets the gradient's first value" in note and "layers.N." in note and "h.N." in note
    assert {step.factor for step in plan.steps} == {0.5}
    assert not any("gradient" in note for note in planned(data).notes)
    assert not any("gradient" in note for note in planned({"merge_method": "linear"}, {"w": (2, 2)}).notes)


# --- whole merges


def layer_by_layer(directory, out, data, scalars):
    """Tensors of several merges: those of layer i from the merge with `scalars(depth of i)`, others from the first."""
    found = {}
    for i in range(LAYERS):
        dk.merge(data | scalars(i / (LAYERS - 1)), out / f"layer{i}", force=True)
        for name, array in families.load(out / f"layer{i}").items():
            if name.startswith(f"model.layers.{i}.") or (i == 0 and ".layers." not in name):
                found[name] = array
    return found


def test_a_merge_with_gradients_is_made_of_merges_with_scalars(deep, tmp_path):
    """Every layer as if its numbers had been written down; what is outside the layers has the first ones."""

    def model(i, **parameters):
        return {"model": str(deep / f"m{i}"), "parameters": parameters}

    def block(**keys):
        return {"method": "dare", "seed": 7, **keys}

    start = families.recipe(deep, k=2, merge_method="ties")
    gradients = start | {
        "models": [model(0, weight=[0, 1, 0.5]), model(1, weight=0.5, drop_rate=[0.5, 1])],
        "sparsify": block(drop_rate=[0.75, 0.25]),
        "parameters": {"lambda": [2, 1], "keep": [{"filter": "mlp", "value": [0.25, 0.75]}, {"value": 0.5}]},
    }
    dk.merge(gradients, tmp_path / "out", force=True)

    def scalars(depth):
        weight = 2 * depth if depth <= 0.5 else 1.5 - depth
        return {
            "models": [model(0, weight=weight), model(1, weight=0.5, drop_rate=0.5 + 0.5 * depth)],
            "sparsify": block(drop_rate=0.75 - 0.5 * depth),
            "parameters": {
                "lambda": 2 - depth,
                "keep": [{"filter": "mlp", "value": 0.25 + 0.5 * depth}, {"value": 0.5}],
            },
        }

    families.same(families.load(tmp_path / "out"), layer_by_layer(deep, tmp_path, start, scalars))
    # The lock lists what was resolved, and its recipe makes the same bytes.
    lock = json.loads((tmp_path / "out" / "darekit.lock.json").read_text())
    for group in lock["resolved"]:
        for name in group["tensors"]:
            depth = int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0
            assert group["lambda"] == 2 - depth
            assert group["weights"] == [scalars(depth)["models"][0]["parameters"]["weight"], 0.5]
            assert group["keep"] == [0.25 + 0.5 * depth if "mlp" in name else 0.5] * 2
            assert [stages[0]["drop_rate"] for stages in group["stages"]] == [0.75 - 0.5 * depth, 0.5 + 0.5 * depth]
    dk.merge(lock["recipe"], tmp_path / "again", force=True)
    families.same(families.load(tmp_path / "out"), families.load(tmp_path / "again"))


@pytest.mark.parametrize("method", ["dare_ties", "della_linear", "breadcrumbs", "ties"])
def test_mergekits_gradients_are_made_of_merges_with_scalars(deep, tmp_path, method):
    start = families.recipe(deep, k=2, merge_method=method)

    def recipe(first, second):
        return {
            "models": [
                {"model": str(deep / "m0"), "parameters": {"density": first, "weight": 0.5}},
                {"model": str(deep / "m1"), "parameters": {"density": second}},
            ],
        }

    dk.merge(start | recipe([0.75, 0.25], [{"filter": "mlp", "value": [0.5, 0.25, 0.5]}, {"value": 0.5}]),
             tmp_path / "out", force=True)  # fmt: skip

    def scalars(depth):
        mlp = 0.25 + abs(depth - 0.5) / 2
        return recipe(0.75 - 0.5 * depth, [{"filter": "mlp", "value": mlp}, {"value": 0.5}])

    families.same(families.load(tmp_path / "out"), layer_by_layer(deep, tmp_path, start, scalars))


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_density_of_0_leaves_nothing_of_a_model(tmp_path, kind):
    """As at one end of a gradient: the tensor is merged as if the model were none of them."""
    rng = np.random.default_rng(3)
    base = families.llama(rng, kind, layers=3)
    families.save(tmp_path / "base", base, families.config(layers=3))
    for i in range(2):
        families.save(tmp_path / f"m{i}", families.tuned(rng, base), families.config(layers=3))
    start = families.recipe(tmp_path, k=2, merge_method="ties")
    ends = [{"model": str(tmp_path / f"m{i}"), "parameters": {"density": own, "weight": 0.5}}
            for i, own in enumerate(([0, 0, 0.5], 0.25))]  # fmt: skip
    report = dk.merge(start | {"models": ends}, tmp_path / "out", force=True)
    assert any(note.startswith("keep 0 (of mergekit's, density 0) leaves nothing of m0 in ") for note in report.notes)
    dk.merge(start | {"models": ends[1:]}, tmp_path / "one", force=True)
    found, one = families.load(tmp_path / "out"), families.load(tmp_path / "one")
    assert not np.array_equal(found["model.layers.2.mlp.up_proj.weight"], one["model.layers.2.mlp.up_proj.weight"])
    families.same(*({name: a for name, a in each.items() if "layers.2." not in name} for each in (found, one)))
    nothing = [{**ends[0], "parameters": {"density": 0}}]
    report = dk.merge(start | {"models": nothing}, tmp_path / "base-again", force=True)
    assert "WARNING: keep 0 (of mergekit's, density 0) leaves nothing of m0" in report.notes
    families.same(families.load(tmp_path / "base-again"), base)


def test_gradients_in_memory(deep):
    rng = np.random.default_rng(0)
    base = {f"h.{i}.w": rng.normal(size=(3, 4)).astype(np.float32) for i in range(3)}
    models = [{name: array + np.float32(1) for name, array in base.items()}]
    merged = dk.merge_tensors(base, models, method="task_arithmetic", weights=[[0, 1]])
    for i, share in enumerate((0, 0.5, 1)):
        assert np.array_equal(
            merged[f"h.{i}.w"], base[f"h.{i}.w"] + np.float32(share) * (models[0][f"h.{i}.w"] - base[f"h.{i}.w"])
        )


def test_a_dry_run_shows_what_gradients_come_to(deep, tmp_path, dare):
    data = families.recipe(
        deep, k=2, sparsify={"method": "dare", "drop_rate": [{"filter": "mlp", "value": [0.9, 0.5]}, {"value": 0.5}]}
    )
    data["models"][1]["parameters"] = {"weight": [0, 0.5, 1]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(data))
    shown = dare("merge", recipe, tmp_path / "out", "--dry-run", "--json", "--force").data["gradients"]
    assert [(row["parameter"], row["model"], row["filter"], row["stack"]) for row in shown] == [
        ("weight", "m1", "*", "model.layers"), ("drop_rate", "", "mlp", "model.layers"),
    ]  # fmt: skip
    assert shown[0]["values"] == [0, 0.25, 0.5, 0.75, 1]
    assert shown[1]["values"] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    said = dare("merge", recipe, tmp_path / "out", "--dry-run", "--force").out
    assert "0: 0  1: 0.25  2: 0.5  3: 0.75  4: 1" in said and "0: 0.9  1: 0.8  2: 0.7  3: 0.6  4: 0.5" in said


def test_tau_may_run_over_the_layers(deep):
    data = families.recipe(deep, k=1, sparsify={"method": "dare", "drop_rate": "auto", "tau": [0.02, 0.1]})
    with open_plan(read_recipe(data)) as plan:
        rates = [plan.rates[0][f"model.layers.{i}.mlp.up_proj.weight"] for i in range(LAYERS)]
    assert rates == sorted(rates) and rates[0] < rates[-1]
    with open_plan(read_recipe(data | {"sparsify": data["sparsify"] | {"tau": 0.06}})) as plan:
        assert plan.rates[0]["model.layers.2.mlp.up_proj.weight"] == rates[2]


# --- switches by tensor and depth, and what is in quotes


@pytest.mark.parametrize(
    ("switch", "on"),
    [
        # mergekit's rule: of n, the one at int(t (n - 1)); t is 0 before and after the layers.
        ([True, False], lambda name, layer: layer != LAYERS - 1),
        ([False, True, False], lambda name, layer: layer in (2, 3)),
        ([True], lambda name, layer: True),
        ([{"filter": "mlp", "value": True}, {"value": 0}], lambda name, layer: "mlp" in name),
        ([{"filter": "mlp", "value": [1, 0]}], lambda name, layer: "mlp" in name and layer != LAYERS - 1),
        ({"filter": "self_attn", "value": "true"}, lambda name, layer: "self_attn" in name),
        ("no", lambda name, layer: False),
    ],
)
def test_a_switch_that_depends_on_the_tensor(deep, tmp_path, switch, on):
    """Each tensor is that of the merge with the switch on, or of the one with it off."""

    def merged(name, value):
        recipe = families.recipe(deep, 2, parameters={"weight": 0.75, "normalize": value})
        dk.merge(recipe, tmp_path / name)
        return families.load(tmp_path / name)

    found, with_it, without = merged("found", switch), merged("on", True), merged("off", False)
    unlike = 0
    for name, array in found.items():
        layer = layer_of(name)
        expected = with_it if on(name, None if layer is None else layer.index) else without
        assert array.tobytes() == expected[name].tobytes(), name
        unlike += with_it[name].tobytes() != without[name].tobytes()
    assert unlike > LAYERS


def test_a_switch_by_tensor_is_in_the_lock(deep, tmp_path):
    dk.merge(families.recipe(deep, 2, parameters={"normalize": [True, False]}), tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "darekit.lock.json").read_text())
    assert lock["recipe"]["parameters"]["normalize"] == [True, False]


@pytest.mark.parametrize(
    ("quoted", "plain"),
    [
        ("weight: '0.5'", "weight: 0.5"),
        ("weight: ['0', ' 1.5']", "weight: [0, 1.5]"),
        ("weight: [{filter: mlp, value: '0.5'}, {value: '1e-1'}]", "weight: [{filter: mlp, value: 0.5}, {value: 0.1}]"),
        ("normalize: 'True'", "normalize: true"),
        ("normalize: 'off'", "normalize: false"),
        ("density: '0.5'", "density: 0.5"),
        ("density: 0.5\n  rescale: 'false'", "density: 0.5\n  rescale: 0.0"),
    ],
)
def test_numbers_and_switches_in_quotes(tmp_path, quoted, plain):
    """mergekit's reader takes them; beside a `sparsify:` block, which it does not know, they stay errors."""
    start = "base_model: b\nmerge_method: dare_ties\nmodels:\n- model: a\n  parameters: {density: 0.3}\nparameters:\n  "
    (tmp_path / "quoted.yaml").write_text(start + quoted)
    (tmp_path / "plain.yaml").write_text(start + plain)
    one, other = (read_recipe(tmp_path / f"{name}.yaml").to_data() for name in ("quoted", "plain"))
    assert one == other
    native = "base_model: b\nmerge_method: ties\nsparsify: {method: dare, drop_rate: 0.5}\nmodels: [a]\nparameters:\n  "
    if "density" not in quoted:
        (tmp_path / "native.yaml").write_text(native + quoted)
        with pytest.raises(RecipeError, match=r"write it without quotes|must be true or false"):
            read_recipe(tmp_path / "native.yaml")


def test_linear_that_is_a_sum_somewhere_is_not_sparsified(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "base_model: b\nmerge_method: linear\nsparsify: {method: dare, drop_rate: 0.5}\nmodels: [a]\n"
        "parameters: {normalize: [{filter: mlp, value: false}]}"
    )
    with pytest.raises(RecipeError, match="a sum of whole models"):
        read_recipe(tmp_path / "r.yaml")
