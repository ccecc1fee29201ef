# SPDX-License-Identifier: Apache-2.0
"""The JSON Schemas of recipes and sweep files agree with the readers, whatever is in the table of methods."""

from __future__ import annotations

import ast
import copy
import json
import re
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from darekit.errors import RecipeError
from darekit.methods import (
    MERGE_ALIASES,
    MERGE_METHODS,
    SEED,
    SPARSIFIERS,
    WEIGHT,
    Choice,
    MergeMethod,
    Number,
    Sparsifier,
    Switch,
)
from darekit.recipe import TOP_KEYS, read_recipe
from darekit.recipe.ignored import PARAMETERS
from darekit.recipe.mergekit import PRODUCTS, model_words, shared_words
from darekit.recipe.schema import recipe_schema
from darekit.searches.reading import KEYS as SEARCH_KEYS
from darekit.searches.reading import read_search
from darekit.searches.schema import search_schema
from darekit.sweeps.reading import KEYS, read_sweep
from darekit.sweeps.schema import sweep_schema
from test_imports import RUN, loaded

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Draft7Validator(recipe_schema())
SWEEPS = Draft7Validator(sweep_schema())
SEARCHES = Draft7Validator(search_schema())


class Core(yaml.SafeLoader):
    """YAML 1.2's core schema, which editors follow: `yes` is text and `1e-5` a number."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.nan", "-+.0123456789"),
    ("merge", "<<", "<"),
):
    Core.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), [*first.replace("\0", ""), ""]
    )


def as_editors_read(text: str) -> Any:
    """What a text is to an editor: JSON's data, with text as keys."""

    def plain(value: Any) -> Any:
        match value:
            case dict():
                return {str(key): plain(item) for key, item in value.items()}
            case list():
                return [plain(item) for item in value]
        return value

    return plain(yaml.load(text, Core))


def flagged(schema: Draft7Validator, data: Any) -> list[str]:
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in schema.iter_errors(data)]


def accepted(read: Any, source: Any) -> bool:
    try:
        read(source)
    except RecipeError:
        return False
    return True


# --- texts that are there ---


def fenced() -> list[str]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    fence = re.compile(r"^```yaml\n(.*?)^```$", re.M | re.S)
    return [text for document in documents for text in fence.findall(document.read_text(encoding="utf-8"))]


def quoted(*names: str) -> list[str]:
    """Every string in the source of these tests."""
    trees = [ast.parse((ROOT / "tests" / name).read_text(encoding="utf-8")) for name in names]
    constants = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [dedent(node.value) for node in constants if isinstance(node.value, str)]


def readable(tmp_path: Path, texts: list[str], read: Any) -> list[str]:
    """The texts that a reader accepts, each once."""
    path = tmp_path / "read.yaml"
    found = []
    for text in dict.fromkeys(texts):
        path.write_text(text, encoding="utf-8")
        if accepted(read, path):
            found.append(text)
    return found


def test_no_recipe_of_the_project_is_flagged(tmp_path):
    examples = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.yaml")]
    texts = [
        *examples,
        *fenced(),
        *quoted("test_recipe.py", "test_mergekit_recipes.py", "test_heads.py", "test_docs.py"),
    ]
    texts = readable(tmp_path, texts, read_recipe)
    assert len(texts) >= 30 and {*examples} <= {*texts}
    assert {text: found for text in texts if (found := flagged(RECIPES, as_editors_read(text)))} == {}


def test_no_sweep_of_the_project_is_flagged(tmp_path):
    experiments = [path.read_text(encoding="utf-8") for path in (ROOT / "paper" / "experiments").glob("*.yaml")]
    texts = [*experiments, *fenced(), *quoted("test_sweeps.py")]
    texts = readable(tmp_path, texts, read_sweep)
    assert len(texts) >= 10
    assert {text: found for text in texts if (found := flagged(SWEEPS, as_editors_read(text)))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "models: [a]\nmerge_method: average\nparameters:\n",
        "base_model: b\nmodels: [{model: a, parameters: }]\nmerge_method: ties\nparameters:\n",
        "models:\n  - model: a\n    parameters:\n  - {model: b, parameters: {weight: 1e-5}}\nmerge_method: linear\n",
        "models: [a, 2024-01-01]\nmerge_method: linear\nparameters: {normalize: yes, weight: 1_000.5}\n",
        "models: [a]\nmerge_method: linear\nparameters: {normalize: 1.0, rescale: off, int8_mask: no}\n",
        "models: [a]\nmerge_method: linear\nparameters: {seed: 1_000, rescale: none}\n",
        "base_model:\nmodels: [a]\nmerge_method: linear\ndtype:\nout_dtype: ~\n"
        "parameters: {rescale: 0, dtype: float16}\n",
        "models: [a]\nmerge_method: linear\nsparsify: {method: dare, drop_rate: .5e+0, on: weights}\n"
        "dtype: torch.float8_e5m2\n",
        "base_model: b\nmodels: [b, {model: a, parameters: {drop_rate: 0.5}}]\nmerge_method: ties\n"
        "sparsify: {method: dare}\n",
        "base_model: b\nmodels: [{model: a, parameters: {rescale: {q: 0.1}}}]\nmerge_method: ties\n"
        "sparsify: {method: dare, drop_rate: auto, tau: 0.1, rescale: paper, q: {value: 0.2}, keep_dense: norms}\n",
        "base_model: b\nmodels: [{model: a, parameters: {density: 0.3, drop_rate: 0.7}}]\nmerge_method: ties\n"
        "sparsify: {method: breadcrumbs}\n",
        "base_model: b\nmodels: [a]\nmerge_method: ties\n"
        "parameters: {density: [{filter: =a, value: 1}], rescale: l1}\n",
        "base_model: b\nmodels: [a]\nmerge_method: dare_ties\nparameters: {density: 0.3, rescale: on, seed: 3}\n",
        "models: [{model: a, stats: f}]\nmerge_method: fisher\nheads: a\n"
        "parameters: {weight: [{filter: x, value: 0}]}\n",
        "base_model: &b b\nmodels: [{model: a, parameters: &p {weight: 2}}, {model: c, parameters: {<<: *p}}]\n"
        "merge_method: ties\ntokenizer_source: *b\nvocab: pad\nout_dtype: float16\ndtype: bfloat16\n",
        "base_model: b\nmodels: [a]\nmerge_method: ties\ntokenizer: {}\nchat_template: auto\n",
        "base_model: b\nmodels: [a]\nmerge_method: ties\nchat_template: '{{ messages[0].content }}'\ntokenizer:\n"
        "  {source: union, pad_to_multiple_of: 8, tokens: {a: {source: {kind: model_token, model: a, token_id: 3}}}}\n",
    ],
)
def test_unusual_recipes_are_not_flagged(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(f"# yaml-language-server: $schema=darekit-recipe.schema.json\n{text}")
    read_recipe(tmp_path / "recipe.yaml")
    assert flagged(RECIPES, as_editors_read(text)) == []


START = "base_model: b\nmodels: [a]\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{START}merge_method: ties\ndtpye: bfloat16\n",
        f"{START}merge_method: tise\n",
        f"{START}merge_method: slerp\n",
        f"{START}merge_method: slerp\nparameters: {{t: 2.5}}\n",
        f"{START}merge_method: zipit\n",
        "models: [a, b, c]\nmerge_method: slerp\nparameters: {t: 0.5}\n",
        "models: [a]\nmerge_method: slerp\nparameters: {t: 0.5}\n",
        f"{START}merge_method: magnitude\n",
        f"{START}",
        "base_model: b\nmerge_method: ties\n",
        "base_model: b\nmodels: []\nmerge_method: ties\n",
        "base_model: b\nmodels: a\nmerge_method: ties\n",
        "base_model: b\nmodels: [{parameters: {weight: 1}}]\nmerge_method: ties\n",
        "base_model: b\nmodels: [{model: a, weight: 1}]\nmerge_method: ties\n",
        "base_model: b\nmodels: [7]\nmerge_method: ties\n",
        "base_model: 5\nmodels: [a]\nmerge_method: linear\n",
        "models: [a]\nmerge_method: ties\n",
        "models: [a]\nmerge_method: dare_linear\nparameters: {density: 0.5}\n",
        "models: [a]\nmerge_method: linear\nsparsify: {method: dare, drop_rate: 0.5}\n",
        f"{START}merge_method: ties\nparameters: {{lamda: 1}}\n",
        f"{START}merge_method: ties\nparameters: 1\n",
        f"{START}merge_method: ties\nparameters: {{keep: 20}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: -0.1}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: 'a fifth'}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: 20%}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: true}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: }}\n",
        f"{START}merge_method: ties\nparameters: {{keep: auto}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: 0.2, density: 0.2}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: []}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: [{{filter: a}}]}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: [{{filter: a, value: 2}}]}}\n",
        f"{START}merge_method: linear\nsparsify: {{method: dare, drop_rate: [{{filter: '', value: 1}}]}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: [{{filter: '=', value: 1}}]}}\n",
        f"{START}merge_method: ties\nparameters: {{keep: [{{fliter: a, value: 1}}]}}\n",
        f"{START}merge_method: ties\nparameters: {{trim: all}}\n",
        f"{START}merge_method: ties\nparameters: {{trim: [{{filter: a, value: tensor}}]}}\n",
        f"{START}merge_method: ties\nparameters: {{normalize: maybe}}\n",
        f"{START}merge_method: ties\nparameters: {{normalize: 2}}\n",
        f"{START}merge_method: ties\nparameters: {{rescale: true}}\n",
        f"{START}merge_method: ties\nparameters: {{drop_rate: 0.9}}\n",
        f"{START}merge_method: ties\nparameters: {{seed: 0.5}}\n",
        f"{START}merge_method: dare_ties\nparameters: {{density: 0.5, keep: 0.2}}\n",
        f"{START}merge_method: della\nparameters: {{density: 0.5, epsilon: 0.6}}\n",
        f"{START}merge_method: dare_ties\nsparsify: {{method: dare, drop_rate: 0.9}}\n",
        f"{START}merge_method: ties\nsparsify:\n",
        f"{START}merge_method: ties\nsparsify: dare\n",
        f"{START}merge_method: ties\nsparsify: {{drop_rate: 0.9}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dear, drop_rate: 0.9}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 90}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, window: 0.1}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: della, drop_rate: 0.9, gamma: 0.1}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: della, drop_rate: auto}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, rescale: sum}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, rescale: {{q: 0}}}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, rescale: {{p: 0.1}}}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, rescale: {{q: 0.1}}, q: 0.1}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, rescale: l1, q: 0.1}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: magnitude, drop_rate: 0.9, rescale: {{q: 0.1}}}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, on: weights}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, on: models}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, seed: -1}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, keep_dense: [norm]}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, keep: 0.2}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9}}\nparameters: {{seed: 1}}\n",
        f"{START}merge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9}}\nparameters: {{density: 0.1}}\n",
        "base_model: b\nmodels: [{model: a, parameters: {density: 0.1}}]\nmerge_method: ties\n"
        "sparsify: {method: dare, drop_rate: 0.9}\n",
        "base_model: b\nmodels: [{model: a, parameters: {density: 0.1}}]\nmerge_method: ties\n"
        "sparsify: {method: breadcrumbs, drop_rate: 0.9}\n",
        "base_model: b\nmodels: [{model: a, parameters: {keep: 0.1}}]\nmerge_method: task_arithmetic\n"
        "sparsify: {method: dare, drop_rate: 0.9}\n",
        "base_model: b\nmodels: [{model: a, stats: f}]\nmerge_method: ties\n",
        "models: [{model: a}]\nmerge_method: fisher\n",
        "models: [a]\nmerge_method: regmean\n",
        "models: [{model: a, stats: f, parameters: {weight: -1}}]\nmerge_method: fisher\n",
        f"{START}merge_method: ties\ndtype: bf16\n",
        f"{START}merge_method: ties\ndtype: int8\n",
        f"{START}merge_method: ties\nvocab: union\n",
        f"{START}merge_method: ties\ntokenizer: union\n",
        f"{START}merge_method: ties\ntokenizer: {{tokens: {{a: {{source: {{kind: zeros}}}}}}}}\n",
        f"{START}merge_method: ties\ntokenizer: {{pad_to_multiple_of: 0}}\n",
        f"{START}merge_method: ties\nchat_template: chatlm\n",
        f"{START}merge_method: ties\nheads: [a]\n",
        "base_model: b\nmerge_method: ties\nslices: []\n",
        "recipe: r.yaml\naxes: {sparsify.drop_rate: [0.5]}\ntest: {a: {data: a.jsonl}}\n",
        "[a, b]\n",
    ],
)
def test_both_refuse(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    assert not accepted(read_recipe, tmp_path / "recipe.yaml")
    assert flagged(RECIPES, as_editors_read(text))


SWEEP = "recipe: {models: [a], merge_method: linear}\n"
AXES = "axes: {parameters.weight: [1, 2]}\n"
TEST = "test: {a: {data: a.jsonl}}\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{SWEEP}{AXES}{TEST}",
        f"recipe: r.yaml\n{AXES}validation: {{a: {{command: [python, judge.py, 3]}}}}\nchoose:\nseeds: 7\n",
        f"{SWEEP}axes: {{m: {{A: , B: {{merge_method: null, judges: a}}}}, kind: [1, 2]}}\n{TEST}seeds: []\n",
        f"{SWEEP}{AXES}test: {{a: {{tasks: [x], limit: , chat_template: yes}}, b: {{c: f.py:g, d: {{data: x}}}}}}\n",
        f"recipe: {{sparsify: , models: [{{parameters: {{drop_rate: auto}}}}]}}\n{AXES}{TEST}"
        "plot: {x: parameters.weight}\n",
    ],
)
def test_unusual_sweeps_are_not_flagged(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    read_sweep(tmp_path / "sweep.yaml")
    assert flagged(SWEEPS, as_editors_read(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        f"{SWEEP}{AXES}",
        f"{SWEEP}{TEST}",
        f"{AXES}{TEST}",
        f"recipe: {{}}\n{AXES}{TEST}",
        f"{SWEEP}{AXES}{TEST}seed: 1\n",
        f"{SWEEP}{AXES}{TEST}seeds: [1, 1]\n",
        f"{SWEEP}{AXES}{TEST}seeds: [0.5]\n",
        f"{SWEEP}{AXES}{TEST}seeds:\n",
        f"{SWEEP}{AXES}{TEST}choose: 1\n",
        f"{SWEEP}{AXES}{TEST}plot: {{y: a}}\n",
        f"{SWEEP}axes: {{seeds: [1, 2]}}\n{TEST}",
        f"{SWEEP}axes: {{parameters.weight: 1}}\n{TEST}",
        f"{SWEEP}axes: {{parameters.weight: []}}\n{TEST}",
        f"{SWEEP}axes: {{parameters.weight: [1, 1]}}\n{TEST}",
        f"{SWEEP}axes: {{parameters.weight: [1, ]}}\n{TEST}".replace(", ]", ", null]"),
        f"{SWEEP}axes: {{m: {{A: 1}}}}\n{TEST}",
        f"{SWEEP}axes: {{kind: {{A: {{}}}}}}\n{TEST}",
        f"{SWEEP}{AXES}test: {{mean: {{data: a.jsonl}}}}\n",
        f"{SWEEP}{AXES}test: {{data: a.jsonl}}\n",
        f"{SWEEP}{AXES}test: {{a: {{}}}}\n",
    ],
)
def test_both_refuse_a_sweep(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    assert not accepted(read_sweep, tmp_path / "sweep.yaml")
    assert flagged(SWEEPS, as_editors_read(text))


@pytest.mark.parametrize(
    "text",
    [
        f"recipe: {{models: [a], merge_metod: linear}}\n{AXES}{TEST}",
        f"recipe: {{models: [a], merge_method: linear, parameters: {{lamda: 1}}}}\n{AXES}{TEST}",
        f"recipe: {{models: [a], sparsify: {{method: dare, drop_rate: 90}}}}\n{AXES}{TEST}",
        f"{SWEEP}{AXES}test: {{a: {{data: a.jsonl, limt: 3}}}}\n",
        f"{SWEEP}{AXES}test: {{a: {{data: a.jsonl, limit: 0}}}}\n",
        f"{SWEEP}{AXES}test: {{a: {{data: a.jsonl, tasks: x}}}}\n",
        f"{SWEEP}{AXES}test: {{a: {{nobody: 3}}}}\n",
    ],
)
def test_a_sweeps_recipe_and_judges_are_checked(text):
    """The reader leaves both to the run."""
    assert flagged(SWEEPS, as_editors_read(text))


# --- recipes from the table ---

FILTERS = st.sampled_from(["mlp", "model.layers.0.*", "=lm_head.weight", "*norm*"])


def single(parameter, *, low=None):
    """Values that a parameter may have, one for all tensors."""
    kind = parameter.kind
    if parameter.name == SEED.name:
        return st.integers(0, 2**64 - 1)
    if isinstance(kind, Switch):
        return st.booleans() | st.sampled_from([0, 1, 1.0])
    if isinstance(kind, Choice):
        return st.sampled_from(kind.of)
    low = max(kind.low, -1e6) if low is None else low
    if kind.whole:
        return st.integers(int(low), int(min(kind.high, 1e6)))
    numbers = st.floats(low, min(kind.high, 1e6), allow_subnormal=False)
    ends = [end for end in (low, kind.high, 1) if abs(end) <= 1e6 and low <= end <= kind.high]
    return (
        numbers
        | st.sampled_from(ends)
        | numbers.map(lambda number: f"{number:.5e}").filter(lambda text: low <= float(text) <= kind.high)
    )


@cache
def values(parameter, *, low=None):
    """Values that a parameter may have, also one for each tensor."""
    one = single(parameter, low=low)
    if not isinstance(parameter.kind, Number) or parameter.name == SEED.name:
        return one
    entry = st.fixed_dictionaries({"filter": FILTERS, "value": one})
    rest = st.lists(st.fixed_dictionaries({"value": one}), max_size=1)
    return one | entry | st.builds(lambda head, tail: head + tail, st.lists(entry, min_size=1, max_size=2), rest)


def some(draw, parameters, **low):
    """A block with some of these parameters."""
    names = draw(st.lists(st.sampled_from([*parameters]), max_size=3, unique=True))
    return {name: draw(values(parameters[name], low=low.get(name))) for name in names}


def spelled(method):
    return st.sampled_from([method, *(alias for alias, name in MERGE_ALIASES.items() if name == method)])


KEPT = ("norms", ["heads", "*.k_proj.*"], [])


@st.composite
def good(draw):
    """A recipe that must be accepted, in either form."""
    form = draw(st.sampled_from(["sparsified", "native", "product"]))
    method = draw(st.sampled_from([*PRODUCTS] if form == "product" else [*MERGE_METHODS]))
    merge = MERGE_METHODS[PRODUCTS[method].merge if form == "product" else method]
    low = {"weight": 0} if merge.statistics else {}
    recipe: dict[str, Any] = {"merge_method": draw(spelled(method))}
    if form == "sparsified":
        sparsifier = draw(st.sampled_from([*SPARSIFIERS]))
        sparse = dict(SPARSIFIERS[sparsifier].parameters)
        own = {n: p for n, p in (sparse | merge.parameters).items() if isinstance(p.kind, Number) and p.kind.per_model}
        weight = {merge.weight_word: WEIGHT} if merge.weighted else {}
        own |= weight | {"seed": SEED}
        shared = weight | merge.parameters
        block = some(draw, sparse) | {"method": sparsifier, "drop_rate": draw(values(sparse["drop_rate"]))}
        if sparsifier == "dare" and draw(st.booleans()):
            block |= {"drop_rate": "auto", "tau": 0.25}
        if "q" in sparse:  # two ways to rescale
            block.pop("rescale" if draw(st.booleans()) else "q", None)
            own.pop("q")
        block |= draw(st.sampled_from([{}, {"on": "delta", "seed": 7}, *({"keep_dense": kept} for kept in KEPT)]))
        recipe["sparsify"] = block
    else:
        own, shared = model_words(method), shared_words(method, ours=False)
        for word in ("rescale", "density", "keep") if form == "native" else ("density",):
            own.pop(word, None)
            shared.pop(word, None)
    least, most = merge.models
    names = draw(
        st.lists(st.sampled_from(["m0", "org/m1", "./m2"]), min_size=least, max_size=min(3, most), unique=True)
    )
    models: list[Any] = []
    for name in names:
        entry: dict[str, Any] = {"model": name}
        if draw(st.booleans()):
            entry["parameters"] = some(draw, own, **low)
        if merge.statistics:
            entry["stats"] = f"{name}.safetensors"
        models.append(name if [*entry] == ["model"] and draw(st.booleans()) else entry)
    recipe["models"] = models
    parameters = some(draw, shared, **low)
    parameters |= {
        name: draw(values(parameter)) for name, parameter in merge.parameters.items() if parameter.default is None
    }
    if form == "product":
        parameters["density"] = 0.5
    if form == "sparsified" and method == "linear":
        parameters.pop("normalize", None)
    if parameters or draw(st.booleans()):
        recipe["parameters"] = parameters
    if merge.needs_base or form == "sparsified" or draw(st.booleans()):
        recipe["base_model"] = "base"
    more = [{"dtype": "torch.float16", "vocab": "pad"}, {"tokenizer_source": names[0], "heads": names[-1]}]
    return recipe | draw(st.sampled_from([{}, *more]))


@given(good())
@settings(max_examples=100)
def test_good_recipes_pass_both(recipe):
    read_recipe(recipe)
    assert flagged(RECIPES, recipe) == []
    assert flagged(RECIPES, as_editors_read(yaml.safe_dump(recipe))) == []
    assert flagged(RECIPES, read_recipe(recipe).to_data()) == []


def blocks(recipe):
    """A recipe's blocks of parameters."""
    entries = [entry for entry in recipe["models"] if isinstance(entry, dict)]
    found = [recipe.get("parameters"), recipe.get("sparsify"), *(entry.get("parameters") for entry in entries)]
    return [block for block in found if block is not None]


def known_to(recipe):
    """Parameters that a recipe's methods take somewhere."""
    method = MERGE_ALIASES.get(recipe["merge_method"], recipe["merge_method"])
    if "sparsify" not in recipe:
        return shared_words(method, ours=False) | model_words(method)
    sparsifier = SPARSIFIERS[recipe["sparsify"]["method"]]
    weight = {MERGE_METHODS[method].weight_word: WEIGHT} if MERGE_METHODS[method].weighted else {}
    return weight | {"seed": SEED} | MERGE_METHODS[method].parameters | sparsifier.parameters


def known_to_all():
    """Parameters of every method, and mergekit's words for them."""
    every = {n: p for entry in (*SPARSIFIERS.values(), *MERGE_METHODS.values()) for n, p in entry.parameters.items()}
    for method in PRODUCTS:
        every |= shared_words(method)
    return every


@st.composite
def mangled(draw):
    """A good recipe with one or two words of any method in one of its blocks, or without one of its keys."""
    recipe = copy.deepcopy(draw(good()))
    every, places = known_to_all(), blocks(recipe)
    kind = draw(st.sampled_from(["word", "key", "method"]))
    if kind == "word" and places:
        block = draw(st.sampled_from(places))
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from([*every]))
            block[name] = draw(values(every[name]) | st.sampled_from(["auto", {"q": 0.5}, None, "true", True, 0, -1]))
    elif kind == "key":
        holder = draw(st.sampled_from([recipe, *places]))
        if holder:
            holder.pop(draw(st.sampled_from([*holder])))
    else:
        recipe["merge_method"] = draw(st.sampled_from([*MERGE_METHODS, *PRODUCTS]))
    return recipe


@given(mangled())
@settings(max_examples=300)
def test_what_the_reader_accepts_is_not_flagged(recipe):
    if accepted(read_recipe, recipe):
        assert flagged(RECIPES, recipe) == []


def mappings(value):
    """Every mapping in a recipe, itself first."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings(item)


@given(good(), st.data())
@settings(max_examples=100)
def test_a_mistyped_key_is_flagged(recipe, data):
    holder = data.draw(st.sampled_from([one for one in mappings(recipe) if one]))
    key = data.draw(st.sampled_from([*holder]))
    typo = data.draw(st.sampled_from([f"{key}s", key[1:], f"{key}_", key.replace("_", "-") + "-"]))
    holder[typo] = holder.pop(key)
    assert not accepted(read_recipe, recipe)
    assert flagged(RECIPES, recipe)


WRONG = ["much", "0.5.1", "50%", [0.5, "a"], {"filter": "mlp"}, {}, [], None]


def wrong_values(parameter):
    """Values that a parameter can have nowhere."""
    kind = parameter.kind
    if parameter.name == SEED.name:
        return [*WRONG, -1, 2**64 + 2**12, 0.5, True]
    if isinstance(kind, Switch):
        return [*WRONG, 2, -1]
    if isinstance(kind, Choice):
        return [*WRONG, kind.of[0].upper() + "!", 7]
    ends = [end for end in (kind.low - 0.5, kind.high + 0.5, kind.high * 50) if abs(end) < 1e9]
    return [*WRONG, True, *ends, *([{"filter": "mlp", "value": end}] for end in ends)]


@given(good(), st.data())
@settings(max_examples=150)
def test_a_wrong_value_is_flagged(recipe, data):
    known = known_to(recipe)
    places = [(block, name) for block in blocks(recipe) for name in block if name in known]
    block, name = data.draw(st.sampled_from(places or [(recipe.setdefault("parameters", {}), min(known))]))
    block[name] = data.draw(st.sampled_from(wrong_values(known[name])))
    assert not accepted(read_recipe, recipe)
    assert flagged(RECIPES, recipe)


@given(good(), st.data())
@settings(max_examples=100)
def test_a_parameter_of_another_method_is_flagged(recipe, data):
    foreign = {*known_to_all()} - {*known_to(recipe)} - {"rescale", "density"}  # those two are told apart above
    foreign -= set() if "sparsify" in recipe else {*PARAMETERS}  # mergekit ignores its own, and so do we
    block = data.draw(st.sampled_from(blocks(recipe) or [recipe.setdefault("parameters", {})]))
    block[data.draw(st.sampled_from(sorted(foreign)))] = 0.5
    assert not accepted(read_recipe, recipe)
    assert flagged(RECIPES, recipe)


# --- search files ---

SEARCH = """
recipe: {base_model: b, models: [m0, m1], merge_method: task_arithmetic, sparsify: {method: dare, drop_rate: 0.5}}
space:
  merge: {plain: , TIES: {merge_method: ties, parameters.keep: 0.2}}
  models.*.parameters.weight: {low: 0, high: 1.5, layers: 4, stepped: true}
  parameters.lambda: {low: 0.1, high: 2, log: true, groups: [mlp, attention]}
  sparsify.drop_rate: auto
  sparsify.method: [dare, magnitude]
seeds: [1, 2]
constraints: {weights: {sum: 1, negative: false}}
try: [{parameters.lambda: 1}]
at_least: {a: 0.95 of base, min: 0.5}
at_most: {a/loss: 2}
choose: [{min: [a, chat]}, a/loss]
sampler: {name: tpe, seed: 3}
rungs: [1/9, 1/3, 1]
round: 3
trials: 20
validation: {a: {data: a.jsonl}, chat: {python: "judge.py:score"}}
test: {a: {data: b.jsonl}, chat: {python: "judge.py:score"}}
"""


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True), ({"choose": "relative min"}, True), ({"choose": "min of a, chat"}, True), ({"rungs": [1]}, True),
        ({"rungs": False}, True), ({"sampler": "random"}, True), ({"constraints": {}}, True), ({"test": None}, True),
        ({"choose": "a", "at_least": None}, True), ({"trials": 0}, False), ({"sampler": "tep"}, False),
        ({"axes": {}}, False), ({"space": {}}, False), ({"space": {"parameters.lambda": 1}}, False),
        ({"space": {"parameters.lambda": {"low": 0}}}, False), ({"space": {"parameters.lambda": [1]}}, False),
        ({"space": {"parameters.lambda": {"low": 0, "high": 1, "layer": 4}}}, False),
        ({"space": {"parameters.lambda": {"low": 0, "high": 1, "groups": ["mpl"]}}}, False),
        ({"seeds": [1]}, False), ({"constraints": {"weight": {"sum": 1}}}, False), ({"storage": "here"}, False),
        ({"choose": {"men": ["a", "chat"]}}, False), ({"choose": {"min": ["a"]}}, False), ({"try": {"a": 1}}, False),
        ({"at_least": {"a": "most of base"}}, False), ({"validation": None}, False), ({"rungs": [2]}, False),
        ({"test": {"mean": {"data": "a.jsonl"}}}, False), ({"rungs": ["1/3, 1"]}, False),
        ({"at_least": {"a": "95%"}}, False), ({"at_least": {"a": "1e-1 OF base"}}, True),
        ({"constraints": {"weights": {"sum": 0}}}, False),
        ({"space": {"parameters.lambda": {"low": 0, "high": 1, "layers": 1}}}, False),
        ({"space": {"parameters.lambda": {"low": 0, "high": 1, "step": 0}}}, False),
    ],
)  # fmt: skip
def test_search_files_are_flagged_where_the_reader_refuses_them(change, good):
    changed = yaml.safe_load(SEARCH) | change
    search = {key: value for key, value in changed.items() if value is not None}
    assert accepted(read_search, search) is good
    assert bool(flagged(SEARCHES, search)) is not good, [error.message for error in flagged(SEARCHES, search)]


# --- what it is made of ---


def test_it_is_a_schema_of_the_readers_keys():
    for schema, keys in ((recipe_schema(), TOP_KEYS), (sweep_schema(), KEYS), (search_schema(), SEARCH_KEYS)):
        Draft7Validator.check_schema(schema)
        known = [name for name, one in schema["properties"].items() if "ignored" not in one.get("description", "")]
        assert tuple(known) == keys
        assert json.loads(json.dumps(schema, allow_nan=False)) == schema
        text = json.dumps(schema)
        assert {*re.findall(r'"#/definitions/([^"]+)"', text)} == {*schema["definitions"]}


def test_help_ranges_and_defaults_come_from_the_table():
    definitions = recipe_schema()["definitions"]
    for owner, entry in [*SPARSIFIERS.items(), *MERGE_METHODS.items()]:
        for name, parameter in entry.parameters.items():
            found = [one for key, one in definitions.items() if key.rpartition(".")[2] == name]
            described = [one for one in found if one["description"] == parameter.kind.help]
            if parameter.default is not None:
                described = [one for one in described if one["default"] == parameter.default]
            if isinstance(parameter.kind, Choice):
                described = [one for one in described if one.get("enum") == [*parameter.kind.of]]
            if isinstance(parameter.kind, Number) and parameter.kind.high == 1:
                described = [
                    one for one in described if one["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
                ]
            assert described, f"{owner}.{name}"


def fake_merge(
    deltas, weights, *, pull: Annotated[float, Number("how hard it pulls", 2, 3)] = 2.5,
    way: Annotated[str, Choice("which way", ("up", "down"))] = "up",
):  # fmt: skip
    """Pulls.

    Source: nowhere.
    """


def fake_sparsifier(
    delta, draws, *, drop_rate: Annotated[float, Number("what is dropped", 0, 1)],
    sieve: Annotated[float, Number("width of the sieve", 0, 9)],
):  # fmt: skip
    """Sieves."""


def test_a_new_method_is_in_it_at_once(monkeypatch, dare):
    monkeypatch.setitem(MERGE_METHODS, "fake_merge", MergeMethod(fake_merge))
    monkeypatch.setitem(SPARSIFIERS, "fake_sparsifier", Sparsifier(fake_sparsifier, "element", random=True))
    schema = Draft7Validator(json.loads(dare("schema").out))
    names = schema.schema["properties"]["merge_method"]
    assert names["enumDescriptions"][names["enum"].index("fake_merge")] == "Pulls."
    assert schema.schema["definitions"]["fake_merge.pull"]["description"] == "how hard it pulls"
    recipe: dict[str, Any] = {
        "base_model": "b",
        "models": [{"model": "a", "parameters": {"pull": 3, "sieve": 4}}],
        "sparsify": {"method": "fake_sparsifier", "drop_rate": 0.5},
        "merge_method": "fake_merge",
        "parameters": {"way": "down", "lambda": 2},
    }
    read_recipe(recipe)
    assert flagged(schema, recipe) == []
    assert flagged(RECIPES, recipe)
    for change in (
        {"parameters": {"way": "left"}},
        {"parameters": {"pull": 4}},
        {"parameters": {"keep": 0.2}},
        {"models": ["a"]},  # sieve has no default
        {"merge_method": "ties"},  # pull is not ties'
        {"base_model": None},
    ):
        wrong = {key: value for key, value in (recipe | change).items() if value is not None}
        assert not accepted(read_recipe, wrong)
        assert flagged(schema, wrong), change
    sweep = {"recipe": recipe, "axes": {"parameters.pull": [2, 3]}, "test": {"a": {"data": "a.jsonl"}}}
    assert flagged(Draft7Validator(sweep_schema()), sweep) == [] and flagged(SWEEPS, sweep)


# --- the command ---


@pytest.mark.parametrize(
    "arguments", [["schema"], ["schema", "recipe"], ["schema", "sweep"], ["schema", "search"], ["schema", "--help"]]
)
def test_the_command_loads_nothing_that_compiles_or_runs_models(arguments):
    modules, returned, said = loaded(RUN, *arguments)
    assert returned == 0, said
    assert not modules & {"numba", "llvmlite", "torch", "transformers", "huggingface_hub", "lm_eval", "jsonschema"}


def test_the_command_writes_a_file(tmp_path, dare):
    out = tmp_path / "darekit-recipe.schema.json"
    done = dare("schema", "-o", out)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith(f"Wrote {out}")
    assert "# yaml-language-server: $schema=darekit-recipe.schema.json" in done.out
    assert json.loads(out.read_text()) == recipe_schema() == json.loads(dare("schema", "recipe").out)
    assert json.loads(dare("schema", "sweep").out) == sweep_schema()
    assert json.loads(dare("schema", "search").out) == search_schema()
    out.write_text('{"$schema": "older", "title": "darekit recipe"}')
    assert dare("schema", "--out", out).code == 0
    assert json.loads(out.read_text()) == recipe_schema()


def test_the_command_replaces_nothing_but_a_schema(tmp_path, dare):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("models: [a]\nmerge_method: linear\n")
    done = dare("schema", "-o", recipe)
    assert done.code == 1 and "exists and is not the schema of a darekit recipe" in done.err
    assert recipe.read_text() == "models: [a]\nmerge_method: linear\n"
    other = tmp_path / "sweep.json"
    assert dare("schema", "sweep", "-o", other).code == 0
    assert "is not the schema of a darekit recipe" in dare("schema", "-o", other).err
    assert "cannot be written" in dare("schema", "-o", tmp_path / "nowhere" / "a.json").err
    assert dare("schema", "packs").code == 2
