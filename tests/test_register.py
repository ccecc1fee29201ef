# SPDX-License-Identifier: Apache-2.0
"""Methods of one's own: what can be registered, what installed packages bring, and whose code it was."""

import json
import os
import re
import subprocess
import sys
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest

import darekit as dk
import families
from darekit.engine.steps import TRIM, TRIM_AT, TRIM_MODEL
from darekit.errors import DataError, MethodError, OutputError, RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS, installed, registry
from darekit.recipe.origins import origins_of
from darekit.register import Choice, DropRate, Number, Switch

BASE = {"w": np.float32([[0, 0, 0], [1, 1, 1]]), "v": np.float32([2, 2])}
FIRST = {"w": np.float32([[3, 1, 0], [1, 2, 1]]), "v": np.float32([2, 5])}
SECOND = {"w": np.float32([[-1, -2, 4], [1, 0, 3]]), "v": np.float32([1, 3])}


@pytest.fixture(autouse=True)
def tables():
    """Whatever a test registers or imports is gone after it."""
    kept = dict(SPARSIFIERS), dict(MERGE_METHODS), set(sys.modules)
    yield
    for table, before in zip((SPARSIFIERS, MERGE_METHODS), kept, strict=False):
        table.clear()
        table.update(before)
    for name in set(sys.modules) - kept[2]:
        if getattr(sys.modules[name], "__name__", "").startswith("own_"):
            del sys.modules[name]


def strongest(deltas, weights, *, power: Annotated[float, Number("how much", 0, 2)] = 1.0):
    """Of each element the largest change, whoever made it. Not so the others.

    Source: this test.
    """
    chosen = np.abs(weights[:, None] * deltas).argmax(axis=0)
    return np.take_along_axis(deltas, chosen[None], axis=0)[0] * power


# --- what a registered method does


def test_a_merge_of_deltas():
    assert dk.register.merge_method(strongest) is strongest
    merged = dk.merge_tensors(BASE, [FIRST, SECOND], method="strongest")
    assert merged["w"].tolist() == [[3, -2, 4], [1, 2, 3]] and merged["v"].tolist() == [1, 5]
    twice = dk.merge_method("strongest", power=2, **{"lambda": 0.5})
    assert np.array_equal(dk.merge_tensors(BASE, [FIRST, SECOND], method=twice)["w"], merged["w"])


def test_weights_that_are_not_taken_may_not_be_given():
    @dk.register.merge_method
    def biggest(deltas):
        return deltas.max(axis=0)

    merged = dk.merge_tensors(BASE, [FIRST, SECOND], method="biggest")
    assert merged["w"].tolist() == [[3, 1, 4], [1, 2, 3]]
    with pytest.raises(RecipeError, match="biggest takes no weights"):
        dk.merge_tensors(BASE, [FIRST, SECOND], method="biggest", weights=[1, 2])


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_a_method_that_sees_rows(scope):
    seen = set()

    @dk.register.merge_method(scope=scope)
    def centred(deltas, weights):
        seen.add(deltas.shape)
        return deltas.mean(axis=0) - deltas.mean(axis=(0, 2))[:, None]

    merged = dk.merge_tensors(BASE, [FIRST, SECOND], method="centred")
    mean = {name: (FIRST[name] + SECOND[name]) / 2 - BASE[name] for name in BASE}
    for name, one in mean.items():
        assert np.allclose(merged[name], BASE[name] + one - one.mean(axis=-1, keepdims=True), atol=1e-6)
    assert seen == {(2, 2, 3), (2, 1, 2)}


def test_a_mean_works_without_a_base():
    @dk.register.merge_method(needs_base=False)
    def middle(deltas, weights):
        return np.median(deltas, axis=0)

    models = [FIRST, SECOND, BASE]
    expected = np.median(np.stack([one["w"] for one in models]), axis=0)
    assert np.array_equal(dk.merge_tensors(None, models, method="middle")["w"], expected)
    deltas = np.stack([one["w"] - BASE["w"] for one in (FIRST, SECOND, FIRST)])
    found = dk.merge_tensors(BASE, [FIRST, SECOND, FIRST], method="middle")["w"]
    assert np.array_equal(found, BASE["w"] + np.median(deltas, axis=0).astype(np.float32))


def test_a_method_of_products():
    def lines(*, by_row: bool = False):
        return "row" if by_row else "tensor"

    @dk.register.merge_method(products="deltas", vectors=lines)
    def shares(products, weights):
        lengths = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
        return weights * lengths / np.maximum(lengths.sum(axis=-1, keepdims=True), 1e-9)

    deltas = [one["w"].astype(np.float64) - BASE["w"] for one in (FIRST, SECOND)]
    norms = [np.linalg.norm(one) for one in deltas]
    expected = BASE["w"] + sum(d * n / sum(norms) for d, n in zip(deltas, norms, strict=True))
    assert np.allclose(dk.merge_tensors(BASE, [FIRST, SECOND], method="shares")["w"], expected, rtol=1e-6)
    by_row = dk.merge_tensors(BASE, [FIRST, SECOND], method=dk.merge_method("shares", by_row=True))["w"]
    norms = [np.linalg.norm(one, axis=1, keepdims=True) for one in deltas]
    expected = BASE["w"] + sum(d * n / sum(norms) for d, n in zip(deltas, norms, strict=True))
    assert np.allclose(by_row, expected, rtol=1e-6)


def test_a_sparsifier_and_a_mask():
    @dk.register.sparsifier(unbiased=True)
    def coins(delta, draws, *, drop_rate: DropRate):
        kept = draws >= np.uint64(round(drop_rate * 2**32))
        return np.where(kept, delta / delta.dtype.type(1 - drop_rate), 0)

    @dk.register.sparsifier(name="only-positive")
    def positive(delta, *, drop_rate: DropRate):
        return delta > 0

    rng = np.random.default_rng(0)
    base, tuned = {"w": np.zeros((300, 300), np.float32)}, {"w": rng.normal(size=(300, 300)).astype(np.float32)}
    ours = dk.merge_tensors(base, [tuned], sparsify=dk.sparsifier("coins", 0.75, seed=3), method="task_arithmetic")
    dare = dk.merge_tensors(base, [tuned], sparsify=dk.dare(0.75, seed=3), method="task_arithmetic")
    assert np.array_equal(ours["w"], dare["w"]), "the same draws"
    kept = dk.merge_tensors(base, [tuned], sparsify=dk.sparsifier("only-positive", 0.5))["w"]
    assert np.array_equal(kept, np.maximum(tuned["w"], 0))
    assert not SPARSIFIERS["only-positive"].random and SPARSIFIERS["coins"].random


def test_parameters_are_checked_like_any_other():
    @dk.register.merge_method
    def bent(
        deltas,
        weights,
        *,
        by: Annotated[float, Number("bend", 0, 1)],
        how: Literal["up", "down"] = "up",
        far: Annotated[bool, Switch("far")] = False,
        times: int = 1,
        word: Annotated[str, Choice("word", ("a", "b"))] = "a",
    ):
        return sum([deltas.sum(axis=0) * by] * times)

    def merged(**parameters):
        return dk.merge_tensors(BASE, [FIRST], method=dk.merge_method("bent", **parameters))

    for parameters, says in (
        ({}, "bent needs by, bend"),
        ({"by": 2}, r"by must be in \[0, 1\], found 2"),
        ({"by": 0.5, "how": "left"}, "how must be one of up, down"),
        ({"by": 0.5, "times": 1.5}, "times must be a whole number"),
        ({"by": 0.5, "far": 3}, "far must be true or false"),
        ({"by": 0.5, "wrod": "a"}, "bent takes no wrod; its parameters are by, how"),
    ):
        with pytest.raises(RecipeError, match=says):
            merged(**parameters)
    assert np.array_equal(merged(by=1)["w"], FIRST["w"])
    assert np.array_equal(merged(by=0.5, times=2.0)["w"], FIRST["w"])
    filtered = merged(by=[{"filter": "v", "value": 0}, {"value": 1}])
    assert np.array_equal(filtered["w"], FIRST["w"]) and np.array_equal(filtered["v"], BASE["v"])
    with pytest.raises(RecipeError, match="by is one for all models"):
        dk.read_recipe(
            {"base_model": "b", "models": [{"model": "m", "parameters": {"by": 0.5}}], "merge_method": "bent"}
        )


def test_a_gradient_over_depth(llamas, tmp_path):
    @dk.register.merge_method
    def faded(deltas, weights, *, share: Annotated[float, Number("share", 0, 1)] = 1.0):
        return weights @ deltas * share

    recipe = families.recipe(llamas.path, 1, merge_method="faded", parameters={"share": [0, 1]})
    dk.merge(recipe, tmp_path / "out", force=True)
    merged = families.load(tmp_path / "out")
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert merged[first].tobytes() == llamas.base[first].tobytes()
    assert merged[last].tobytes() == llamas.models[0][last].tobytes()


def test_the_schema_has_registered_methods():
    from darekit.recipe.schema import recipe_schema

    dk.register.merge_method(strongest)
    schema = recipe_schema()
    assert "strongest" in schema["properties"]["merge_method"]["enum"]
    assert "strongest" in json.dumps(schema["allOf"])


# --- what cannot be registered


def test_a_name_that_is_taken():
    dk.register.merge_method(strongest)
    dk.register.merge_method(strongest)  # again: a cell of a notebook

    with pytest.raises(MethodError, match=r"strongest is already the name of another method, .*strongest.*name="):

        @dk.register.merge_method(name="strongest")
        def other(deltas):
            return deltas[0]

    for name in ("ties", "dare", "average", "dare_ties", "della_linear"):
        with pytest.raises(MethodError, match=f"{name} is already a name of darekit's own"):
            dk.register.merge_method(name=name)(strongest)
    dk.register.remove("strongest")
    with pytest.raises(MethodError, match="'strongest' is not a registered method"):
        dk.register.remove("strongest")
    with pytest.raises(MethodError, match="'ties' is not a registered method"):
        dk.register.remove("ties")


@pytest.mark.parametrize("name", ["", "on", "null", "True", "1e5", "two words", "a:b", "trim_model", "_x", "é", "base"])
def test_a_name_that_no_recipe_could_say(name):
    with pytest.raises(MethodError, match="cannot be a name in recipes"):
        dk.register.merge_method(name=name)(strongest)


def test_the_engines_own_stages_are_no_names():
    assert {TRIM, TRIM_MODEL, TRIM_AT} <= {*registry.NOT_NAMES}


def _sparse(delta, draws, *, drop_rate: DropRate):
    return delta


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda deltas, weights: deltas[0], "'<lambda>' cannot be a name in recipes"),
        (len, "only a function can be a method"),
    ],
)
def test_what_is_no_function_of_a_name(function, says):
    with pytest.raises(MethodError, match=says):
        dk.register.merge_method(function)


def f1(a, b): ...
def f2(deltas, weights, power=1.0): ...
def f3(deltas, weights, **more): ...
def f4(): ...
def f5(deltas, weights, *, power): ...
def f6(deltas, weights, *, power: str = "a"): ...
def f7(deltas, weights, *, seed: float = 1): ...
def f8(deltas, weights, *, lambda_: float = 1): ...
def f9(deltas, weights, *, power: Annotated[float, Number("p", 0, 1)] = 2): ...
def f10(deltas, weights, *, normalize: float = 1): ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (f1, r"f1 must be called as \(deltas, weights, \*, ...\).*found \(a, b\)"),
        (f2, r"its parameters after the \*; found \(deltas, weights, power=1.0\)"),
        (f3, r"found \(deltas, weights, \*\*more\)"),
        (f4, r"found \(\)"),
        (f5, "its parameter power must say what it takes"),
        (f6, "its parameter power must say what it takes"),
        (f7, "a parameter of a method cannot be called seed"),
        (f8, "a parameter of a method cannot be called lambda"),
        (f9, r"a default is not what the parameter takes: power must be in \[0, 1\], found 2"),
        (f10, "normalize means the same in all methods"),
    ],
)
def test_a_wrong_signature(function, says):
    with pytest.raises(MethodError, match=says):
        dk.register.merge_method(function)
    assert function.__name__ not in MERGE_METHODS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scope": "layer"}, "scope must be element, row or tensor"),
        ({"models": (2, 1)}, "models must be"),
        ({"models": 2}, "models must be"),
        ({"products": "rows"}, "products must be models or deltas"),
        ({"base_row": True}, "belong to methods of products"),
        ({"vectors": len}, "belong to methods of products"),
        ({"products": "models"}, r"must be called as \(products, weights"),
        ({"products": "models", "scope": "row"}, "scope and trims belong to methods of deltas"),
    ],
)
def test_what_does_not_go_together(arguments, says):
    with pytest.raises(MethodError, match=says):
        dk.register.merge_method(**arguments)(strongest)


def test_a_sparsifier_without_a_drop_rate():
    def signs(delta, draws): ...
    def some(delta, *, drop_rate: float): ...
    def none(delta, *, drop_rate: DropRate): ...

    with pytest.raises(MethodError, match="needs the keyword-only argument drop_rate: DropRate"):
        dk.register.sparsifier(signs)
    with pytest.raises(MethodError, match="needs the keyword-only argument drop_rate: DropRate"):
        dk.register.sparsifier(some)
    with pytest.raises(MethodError, match="declared random, so it must take draws"):
        dk.register.sparsifier(random=True, name="some")(none)
    with pytest.raises(MethodError, match="unbiased means a random drop"):
        dk.register.sparsifier(unbiased=True, name="some")(none)


def test_too_few_or_too_many_models():
    dk.register.merge_method(models=(3, 4))(strongest)
    for many, says in ((2, "takes at least 3 models besides base_model, at most 4, found 2"), (5, "found 5")):
        with pytest.raises(RecipeError, match=says):
            dk.merge_tensors(BASE, [FIRST] * many, method="strongest")


# --- what a method may do wrong when it runs


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda deltas: deltas, r"w: bad must return an array of numbers of shape \(6,\), found .* \(1, 6\)"),
        (lambda deltas: 1.0, "found 1.0"),
        (lambda deltas: deltas[0] > 0, "found an array of bool"),
        (lambda deltas: deltas[0] * np.nan, "bad turned 6 finite numbers into NaN or Inf"),
        (lambda deltas: deltas[0][7], r"bad failed at .*test_register.py:\d+: IndexError"),
        (lambda deltas: deltas.fill(0), "its arguments are read-only"),
    ],
)
def test_what_a_function_gives_is_looked_at(result, says):
    def bad(deltas):
        return result(deltas)

    dk.register.merge_method(bad)
    with pytest.raises(MethodError, match=says):
        dk.merge_tensors({"w": BASE["w"]}, [{"w": FIRST["w"]}], method="bad")


def test_what_a_sparsifier_gives_is_looked_at():
    @dk.register.sparsifier
    def bad(delta, *, drop_rate: DropRate):
        return delta[:, 1:]

    with pytest.raises(MethodError, match=r"w: bad must return an array of numbers of shape \(1, 6\)"):
        dk.merge_tensors({"w": BASE["w"]}, [{"w": FIRST["w"]}], sparsify=dk.sparsifier("bad", 0.5))


def test_coefficients_are_looked_at():
    @dk.register.merge_method(products="deltas")
    def bad(products):
        return products

    with pytest.raises(MethodError, match=r"w: bad must return an array of numbers of shape \(1,\)"):
        dk.merge_tensors({"w": BASE["w"]}, [{"w": FIRST["w"]}], method="bad")


def test_a_view_of_the_input_may_be_returned():
    @dk.register.merge_method
    def first(deltas):
        return deltas[0]

    spoilt = {"w": FIRST["w"].copy()}
    spoilt["w"][0, 0] = np.nan
    with pytest.raises(DataError, match="NaN or Inf in the input"):
        dk.merge_tensors({"w": BASE["w"]}, [spoilt], method="first")
    found = dk.merge_tensors({"w": BASE["w"]}, [spoilt], method="first", allow_nonfinite=True)["w"]
    assert found[0, 0] == 0 and np.array_equal(found.reshape(-1)[1:], FIRST["w"].reshape(-1)[1:])


# --- installed packages


LOUDEST = """
import numpy as np
import darekit as dk
from pathlib import Path

with (Path(__file__).parent / "imported").open("a") as file:
    file.write("x")

@dk.register.merge_method
def loudest(deltas, weights):
    \"\"\"The largest change. And more.\"\"\"
    return np.take_along_axis(deltas, np.abs(deltas).argmax(axis=0)[None], axis=0)[0] * SCALE
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package on the fly, in a folder of `sys.path`: `package(source)`; `.imports()`: how often it ran."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    class Package:
        path = site

        def __call__(self, source=LOUDEST, *, module="own_loud", name="loud-methods", version="1.2", scale=1,
                     entries=("loudest",)):  # fmt: skip
            (site / f"{module}.py").write_text(source.replace("SCALE", str(scale)))
            for old in site.glob(f"{name.replace('-', '_')}-*.dist-info"):
                (old / "METADATA").unlink()
                (old / "entry_points.txt").unlink()
                old.rmdir()
            info = site / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            lines = "".join(f"{entry} = {module}\n" for entry in entries)
            (info / "entry_points.txt").write_text(f"[{installed.GROUP}]\n{lines}")

        def forget(self):
            for one in registry.registered():
                registry.remove(one.name)
            for name in [name for name in sys.modules if name.startswith("own_")]:
                del sys.modules[name]

        def imports(self):
            return len((site / "imported").read_text()) if (site / "imported").exists() else 0

    return Package()


def test_an_unknown_name_loads_the_package_that_brings_it(package):
    package()
    dk.merge_tensors(BASE, [FIRST], method="ties")
    dk.merge_tensors(BASE, [FIRST], sparsify=dk.dare(0.5), method="linear")
    assert not package.imports(), "known names load nothing"
    assert np.array_equal(dk.merge_tensors(BASE, [FIRST], method="loudest")["w"], FIRST["w"])
    dk.merge_tensors(BASE, [FIRST], method="loudest")
    assert package.imports() == 1


def test_a_package_may_register_more_than_its_entry_points_say(package):
    package(entries=("other",), source=LOUDEST + "\ndk.register.merge_method(name='other')(loudest)\n")
    dk.merge_tensors(BASE, [FIRST], method="loudest")
    assert package.imports() == 1


def test_help_and_known_names_load_no_package(package, llamas, tmp_path, dare):
    package("raise SystemError('loaded')")
    for arguments in (["--help"], ["methods", "--help"], ["merge", "--help"], ["methods", "ties"]):
        assert dare(*arguments).code == 0
    models = (llamas.path / "base", llamas.path / "m0")
    done = dare("drop", *models, tmp_path / "out", "-p", "0.5", "--method", "magnitude", "--dry-run")
    assert done.code == 0, done.err


def test_dare_methods_shows_whose_a_method_is(package, dare):
    package()
    listed = dare("methods")
    assert listed.code == 0 and not listed.err
    assert re.search(r"\n  loudest +The largest change \(lambda\); from loud-methods 1\.2\n", listed.out), listed.out
    assert listed.out.count("; from ") == 1
    one = dare("methods", "loudest")
    assert "The largest change. And more." in one.out and "\n  from: loud-methods 1.2\n" in one.out
    found = dare("methods", "--json").data["merge_methods"][-1]
    assert found["name"] == "loudest" and found["from"] == "loud-methods 1.2"


def test_dare_schema_has_installed_methods(package, dare):
    package()
    assert "loudest" in json.loads(dare("schema").out)["properties"]["merge_method"]["enum"]


def test_a_package_that_cannot_be_imported(package, dare, llamas, tmp_path):
    package("import nothing_of_this_name\n")
    says = "loud-methods 1.2 (entry point loudest: own_loud), which cannot be loaded: ModuleNotFoundError: No module"
    with pytest.raises(MethodError, match=re.escape(says)):
        dk.merge_tensors(BASE, [FIRST], method="loudest")
    with pytest.raises(RecipeError, match=re.escape(says)) as caught:
        dk.merge_tensors(BASE, [FIRST], method="loudset")
    assert "unknown method 'loudset'" in str(caught.value)
    listed = dare("methods")
    assert listed.code == 0 and "model_stock" in listed.out
    assert says in " ".join(listed.err.split())
    (tmp_path / "r.yaml").write_text(json.dumps(families.recipe(llamas.path, merge_method="loudest")))
    done = dare("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert done.code == 1 and says in " ".join(done.err.split()) and "Traceback" not in done.err


def test_nothing_of_a_package_that_fails_stays_registered(package):
    package(LOUDEST + "\nraise RuntimeError('late')\n")
    with pytest.raises(MethodError, match="RuntimeError: late"):
        dk.merge_tensors(BASE, [FIRST], method="loudest")
    assert "loudest" not in MERGE_METHODS


def test_the_checks_find_installed_methods(package):
    from darekit import testing

    package()
    assert "loudest keeps one model, if it says so" in map(str, testing.checks("loudest"))
    with pytest.raises(MethodError, match="'nowhere' is not a method"):
        testing.checks("nowhere")


def test_packages_that_share_a_namespace(package):
    package()
    package(module="own_loud", name="quiet-methods", version="7", entries=("quietest",),
            source=LOUDEST + "\ndk.register.merge_method(name='quietest')(loudest)\n")  # fmt: skip
    dk.merge_tensors(BASE, [FIRST], method="quietest")
    assert installed.distribution_of(registry.foreign_of("quietest")) == "quiet-methods 7"
    assert installed.distribution_of(registry.foreign_of("loudest")) == "loud-methods 1.2"


def test_a_package_that_does_not_keep_its_word(package):
    package("x = 1\n")
    with pytest.raises(MethodError, match=r"loud-methods 1\.2 says that it brings the method loudest"):
        dk.merge_tensors(BASE, [FIRST], method="loudest")


def test_dare_drop_takes_an_installed_sparsifier(package, llamas, tmp_path, dare):
    package(
        "import darekit as dk\nfrom darekit.register import DropRate\n\n@dk.register.sparsifier\n"
        "def upper(delta, *, drop_rate: DropRate):\n    return delta > 0\n",
        entries=("upper",),
    )
    done = dare("drop", llamas.path / "base", llamas.path / "m0", tmp_path / "out", "-p", "0.5", "--method", "upper")
    assert done.code == 0, done.err
    name = "model.norm.weight"
    merged, base, tuned = families.load(tmp_path / "out")[name], llamas.base[name], llamas.models[0][name]
    assert merged.tobytes() == np.where(tuned > base, tuned, base).tobytes()
    lock = json.loads((tmp_path / "out" / "darekit.lock.json").read_text())
    (told,) = lock["methods"]
    assert told["kind"] == "sparsifier" and told["distribution"] == "loud-methods 1.2"


# --- the test that methods must pass


def checked(name, **parameters):
    from darekit import testing

    failed = []
    for check in testing.checks(name, **parameters):
        try:
            check()
        except (AssertionError, MethodError) as error:
            failed.append(f"{check.title}: {error}")
    return failed


def test_a_good_method_passes():
    dk.register.merge_method(strongest)
    assert not checked("strongest")


@pytest.mark.parametrize(
    ("flaw", "arguments", "says"),
    [
        (lambda d, w: w @ d - (w @ d).mean(), {}, "does not depend on tiles and threads"),
        (lambda d, w: (w @ d) / w.sum() * 2, {"keeps_one": True}, "keeps_one: of one delta"),
        (lambda d, w: w @ d + 1e-3, {}, "leaves the base where no model differs"),
        (lambda d, w: (w @ d) / w.sum() + 0 / (w.sum() > 0), {}, "stays finite with weights of 0"),
        (lambda d, w: np.sign(d).sum(axis=0) * 1e-3, {"needs_base": False}, "needs_base=False is for means"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_flaw_is_found(flaw, arguments, says):
    def flawed(deltas, weights):
        return flaw(deltas, weights)

    dk.register.merge_method(**arguments)(flawed)
    failed = checked("flawed")
    assert any(says in line for line in failed), failed


@pytest.mark.parametrize(
    ("flaw", "arguments", "says"),
    [
        (lambda d, u, p: np.where(u >= p * 2**31, d, 0), {}, "it drops 0.35"),
        (lambda d, u, p: np.where(u >= p * 2**32, d, 0), {"unbiased": True}, "unbiased, but on average 0.3"),
        (lambda d, u, p: np.where(np.abs(d) > np.quantile(np.abs(d), p), d, 0), {}, "the seed changes nothing"),
        (lambda d, u, p: np.where(u >= p * 4.29e9, d, 0), {}, "at drop_rate 1 something is left"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_flaw_of_a_sparsifier_is_found(flaw, arguments, says):
    def flawed(delta, draws, *, drop_rate: DropRate):
        return flaw(delta, draws, drop_rate)

    dk.register.sparsifier(**arguments)(flawed)
    failed = checked("flawed")
    assert any(says in line for line in failed), failed


# --- whose code it was


def test_the_lock_says_whose_code_ran(package, llamas, tmp_path):
    package()
    dk.merge(families.recipe(llamas.path, merge_method="loudest"), tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "darekit.lock.json").read_text())
    (told,) = lock["methods"]
    code = told.pop("code")
    assert re.fullmatch("[0-9a-f]{32}", code)
    assert told == {"name": "loudest", "kind": "merge method", "function": "own_loud:loudest",
                    "distribution": "loud-methods 1.2"}  # fmt: skip
    dk.merge(families.recipe(llamas.path), tmp_path / "plain")
    assert "methods" not in json.loads((tmp_path / "plain" / "darekit.lock.json").read_text())


def stop_after(count):
    """A progress function that ends a run in the middle."""

    def progress(done, whole):
        if done >= whole * count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("change", ["code", "version"])
def test_resume_refuses_other_code(package, llamas, tmp_path, change):
    recipe, out = families.recipe(llamas.path, merge_method="loudest"), tmp_path / "out"
    package()
    with pytest.raises(KeyboardInterrupt):
        dk.merge(recipe, out, threads=1, progress=stop_after(0.0))
    package.forget()
    package(scale=2 if change == "code" else 1, version="1.3" if change == "version" else "1.2")
    with pytest.raises(OutputError, match="code of the merge method loudest"):
        dk.merge(recipe, out, resume=True)
    package.forget()
    package()
    dk.merge(recipe, out, resume=True)
    expected = tmp_path / "expected"
    dk.merge(recipe, expected)
    families.same(families.load(out), families.load(expected))
    package.forget()
    package(scale=2)
    with pytest.raises(OutputError, match="exists"):  # not taken for the finished output of this run
        dk.merge(recipe, out, resume=True)


def test_what_a_digest_of_code_covers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    from darekit.code import digest_of_code

    def digest(main, helper):
        for name in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[name]
        (tmp_path / "own_main.py").write_text(main)
        (tmp_path / "own_helper.py").write_text(helper)
        import own_main

        return digest_of_code(own_main.f)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    main = "import numpy\nfrom own_helper import g\ndef f(deltas):\n    return g(deltas)\n"
    first = digest(main, "def g(x): return x\n")
    assert digest(main, "def g(x): return x\n") == first
    assert digest(main, "def g(x): return -x\n") != first, "what it imports from beside it"
    assert digest(main + "# more\n", "def g(x): return x\n") != first
    names = {}
    exec("def f(x): return x + 1\ndef g(x): return x + 2\ndef h(x): return [y + 1 for y in x]", names)  # typed in
    digests = {digest_of_code(names[name]) for name in "fgh"}
    assert len(digests) == 3 and "0x" not in repr(digests)


# --- sweeps


JUDGE = """
import os, torch
from pathlib import Path

def total(live):
    with Path(os.environ["CALLS"]).open("a") as file:
        file.write(f"{os.getpid()}\\n")
    with torch.no_grad():
        return {"total": float(live.model(input_ids=torch.arange(3, 19).reshape(2, 8)).logits.double().square().sum())}
"""
llama = pytest.mark.parametrize("real", ["llama"], indirect=True)


@pytest.fixture
def sweep(real, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    class Sweep:
        data: ClassVar = {
            "recipe": {
                "base_model": str(real.path / "base"),
                "models": [str(real.path / "m0"), str(real.path / "m1")],
                "merge_method": "loudest",
            },
            "axes": {"parameters.lambda": [0.5, 1]},
            "test": {"all": {"python": f"{tmp_path / 'judge.py'}:total"}},
        }
        out = tmp_path / "swept"

        @staticmethod
        def calls():
            return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    return Sweep()


@llama
def test_a_sweep_judges_again_what_other_code_makes(package, sweep):
    package()
    first = dk.sweep(sweep.data, sweep.out, plots=False)
    count = len(sweep.calls())
    assert not first.failed and count >= 2
    dk.sweep(sweep.data, sweep.out, plots=False)
    assert len(sweep.calls()) == count
    package.forget()
    package(scale=2)
    second = dk.sweep(sweep.data, sweep.out, plots=False)
    assert len(sweep.calls()) == count + 2, "the cells of the method, and no reference"
    scores = [result.finished[0].outcome.scores["test"]["all/total"]["value"] for result in (first, second)]
    assert scores[0] != scores[1]


@pytest.mark.check
@llama
def test_jobs_know_the_methods_of_packages(package, sweep):
    package()
    alone = dk.sweep(sweep.data, sweep.out.with_name("alone"), plots=False)
    several = dk.sweep(sweep.data, sweep.out, jobs=2, plots=False)
    assert not several.failed, [one.outcome.error for one in several.failed]
    assert str(os.getpid()) not in sweep.calls()[len(alone.finished) :]

    def scores(result):
        return [one.outcome.scores for one in result.finished]

    assert scores(several) == scores(alone)


SCRIPT = """
import json, sys
import darekit as dk

def main():
    sweep = json.loads(open(sys.argv[1]).read())
    result = dk.sweep(sweep, sys.argv[2], jobs=2, plots=False, device="cpu")
    print(json.dumps([one.outcome.error for one in result.finished]))

BEFORE
if __name__ == "__main__":
    AFTER
    main()
"""
OWN = "@dk.register.merge_method\ndef loudest(deltas, weights):\n    return weights @ deltas"


@pytest.mark.check
@llama
@pytest.mark.parametrize("guarded", [False, True])
def test_jobs_and_the_methods_of_a_script(sweep, tmp_path, guarded):
    """Processes run a script's top level again, and so its decorators; not what stands below the guard."""
    text = SCRIPT.replace("BEFORE", "" if guarded else OWN)
    text = text.replace("AFTER", OWN.replace("\n", "\n    ") if guarded else "pass")
    (tmp_path / "script.py").write_text(text)
    (tmp_path / "sweep.json").write_text(json.dumps(sweep.data))
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "sweep.json", sweep.out],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = [error for error in json.loads(done.stdout.splitlines()[-1])]
    if guarded:
        assert any(
            "loudest is registered by __main__, but not when another process imports it" in str(e) for e in errors
        )
    else:
        assert errors == [None] * len(errors)


# --- what is known of it


def test_the_origin_of_a_function_of_this_file():
    dk.register.merge_method(strongest)
    recipe = dk.read_recipe({"base_model": "b", "models": ["m"], "merge_method": "strongest"})
    (origin,) = origins_of(recipe)
    assert (origin.module, origin.function, origin.distribution) == (__name__, "strongest", None)
    assert not origins_of(dk.read_recipe({"base_model": "b", "models": ["m"], "merge_method": "ties"}))


@pytest.mark.parametrize("word", ["scale", "filter", "value", "layer_range", "base_model"])
def test_words_of_recipes_are_no_parameters(word):
    namespace = {}
    exec(f"def mine(deltas, weights, *, {word}: float = 1.0):\n    return deltas[0]", namespace)
    with pytest.raises(MethodError, match=f"a parameter of a method cannot be called {word}, which means something"):
        dk.register.merge_method(namespace["mine"])
