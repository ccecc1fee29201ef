# SPDX-License-Identifier: Apache-2.0
"""From checkpoints on disk to a checkpoint on disk: what transformers loads, and every bit of it."""

import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
import oracle
from darekit import machine, masks
from darekit.architectures.groups import group_of
from darekit.checkpoints import open_checkpoint
from darekit.checkpoints.digests import LEAF
from darekit.engine import execution
from darekit.errors import CheckpointError, DataError, HomologyError, PlanError, RecipeError
from darekit.planning.plan import make_plan
from darekit.recipe import read_recipe
from darekit.recipe.single import drop_recipe

BF16 = ml_dtypes.bfloat16
DARE = {"method": "dare", "drop_rate": 0.7}


def lock_of(out):
    return json.loads((out / "darekit.lock.json").read_text())


def formulas(base, models, seeds, **how):
    """The whole model by `oracle.merge`."""
    return {
        name: oracle.merge(name, array, [m[name] for m in models], seeds=seeds, **how) for name, array in base.items()
    }


# --- plans


def open_files():
    """Paths of all files that this process has open."""
    return {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


def value_of(checkpoint):
    info = checkpoint.tensors["model.norm.weight"]
    raw = np.empty(info.nbytes, np.uint8)
    info.source.read_into(raw, 0)
    return raw.tobytes()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux lists the open files")
def test_a_plan_holds_files_open_only_inside_with(llamas, tmp_path):
    paths = {str(llamas.path / name / "model.safetensors") for name in ("base", "m0", "m1")}
    plan = dk.plan(families.recipe(llamas.path, k=2))
    assert not paths & open_files()
    assert plan.bytes_out and plan.steps and plan.notes == () and "m1" in repr(plan.summaries)
    with plan as entered:
        assert entered is plan and paths <= open_files()
        values = {model.ref: value_of(model) for model in plan.models}
    assert not paths & open_files()
    for i in range(2):
        found = values[str(llamas.path / f"m{i}")]
        assert found == llamas.models[i]["model.norm.weight"].tobytes()
    other = [(llamas.path / "base" / "config.json").open("rb") for _ in range(3)]  # take the descriptors
    for checkpoint in plan.checkpoints:
        with pytest.raises(CheckpointError, match=r"model\.safetensors is closed"):
            value_of(checkpoint)
    with plan:
        assert value_of(plan.models[0]) == values[plan.models[0].ref]
    for file in other:
        file.close()


def test_a_plan_whose_files_have_changed_is_not_entered(llamas, tmp_path):
    for name in ("base", "m0"):
        shutil.copytree(llamas.path / name, tmp_path / name)
    plan = dk.plan(families.recipe(tmp_path, k=1))
    families.save(tmp_path / "m0", llamas.models[1])
    with pytest.raises(CheckpointError, match=r"m0.*has changed since"), plan:
        pass
    with pytest.raises(CheckpointError, match=r"base.*is closed"):  # which was opened first
        value_of(plan.base)


# --- transformers loads what we write


def loaded(real, path):
    """The model and what its loader had to say."""
    model, info = real.cls.from_pretrained(path, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.eval()


def logits(model):
    torch = pytest.importorskip("torch")
    tokens = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return model.float()(input_ids=tokens).logits


def in_memory(real, tensors):
    """A model of these arrays, made without any file of darekit's."""
    torch = pytest.importorskip("torch")
    model = real.cls.from_pretrained(real.path / "base")
    state = {n: torch.from_numpy(a.astype(np.float32)).to(model.dtype) for n, a in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    return model.eval()


def test_a_merge_loads_in_transformers_and_computes_what_the_formulas_say(real, tmp_path, dare):
    data = families.recipe(
        real.path, sparsify={"method": "dare", "drop_rate": 0.5, "seed": 3}, parameters={"lambda": 0.5}
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(data))
    out = tmp_path / "merged"
    result = dare("merge", recipe, out)
    assert result.code == 0, result.err
    base, *models = (families.load(real.path / name) for name in ("base", "m0", "m1", "m2"))
    seeds = lock_of(out)["effective_seeds"]
    expected = formulas(
        base, models, seeds, sparsify=("dare", {"drop_rate": 0.5}), method="task_arithmetic", lambda_=0.5
    )
    families.same(families.load(out), expected)
    model = loaded(real, out)
    assert str(model.dtype).removeprefix("torch.") == real.dtype
    found = logits(model)
    assert found.equal(logits(in_memory(real, expected)))
    assert not found.equal(logits(loaded(real, real.path / "base")))


def test_what_lies_beside_the_weights(real, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path / "merged"
    dk.merge(families.recipe(real.path, sparsify=DARE), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w5 w7 nothing").input_ids == AutoTokenizer.from_pretrained(real.path / "base")(
        "w5 w7 nothing"
    ).input_ids == [5, 7, 0]  # fmt: skip
    config = AutoConfig.from_pretrained(out)
    assert str(config.dtype).removeprefix("torch.") == real.dtype
    assert config.vocab_size == 96 and bool(config.tie_word_embeddings) == (real.kind != "llama")
    has_generation = (real.path / "base" / "generation_config.json").exists()
    assert (out / "generation_config.json").exists() == has_generation == (real.kind != "bert")
    names = {path.name for path in out.iterdir()}
    assert {"darekit.lock.json", "darekit_recipe.yaml", "README.md", "config.json", "model.safetensors"} <= names


def test_drop_loads_and_every_dropped_element_is_the_bases(real, tmp_path, dare):
    out = tmp_path / "dropped"
    result = dare("drop", real.path / "base", real.path / "m0", out, "-p", "0.9", "--seed", "11", "--json")
    assert result.code == 0, result.err
    found, base, model = (families.load(path) for path in (out, real.path / "base", real.path / "m0"))
    kept = 0
    for name, array in base.items():
        survives = masks.kept(11, masks.stream_of(name), 0, array.size, 0.9).reshape(array.shape)
        assert np.array_equal(oracle.raw_of(found[name][~survives]), oracle.raw_of(array[~survives])), name
        delta = model[name].astype(np.float32) - array.astype(np.float32)
        wanted = (array.astype(np.float32) + np.float32(1 / (1 - 0.9)) * delta).astype(array.dtype)
        moved = survives & (delta != 0)
        assert np.array_equal(found[name][moved], wanted[moved]), name
        kept += int(survives.sum())
    assert result.data["kept"] == {str(real.path / "m0"): kept}
    assert lock_of(out)["effective_seeds"] == [11]
    loaded(real, out)


@pytest.mark.parametrize(("rate", "source"), [("0", "m0"), ("1", "base")])
@pytest.mark.parametrize("method", ["dare", "drop_only", "magnitude", "della"])
def test_nothing_and_everything_dropped_is_one_of_the_inputs_bit_for_bit(llamas, tmp_path, dare, method, rate, source):
    out = tmp_path / "out"
    result = dare("drop", llamas.path / "base", llamas.path / "m0", out, "-p", rate, "--method", method)
    assert result.code == 0, result.err
    families.same(families.load(out), families.load(llamas.path / source))


# --- the same bytes


METHODS = {
    "task_arithmetic": {"sparsify": DARE},
    "ties": {"sparsify": DARE, "merge_method": "ties", "parameters": {"keep": 0.3}},
    "trim_model": {"merge_method": "ties", "parameters": {"keep": 0.3, "trim": "model"}},
    "della": {"sparsify": {"method": "della", "drop_rate": 0.6, "window": 0.2}},
    "breadcrumbs_l1": {"sparsify": {"method": "breadcrumbs", "drop_rate": 0.6, "rescale": "l1"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_threads_tiles_and_repetition_do_not_matter(llamas, tmp_path, method):
    data = families.recipe(llamas.path, **METHODS[method])
    outs = []
    for i, (threads, tile) in enumerate([(1, 65536), (7, 64), (7, 64), (2, 1000)]):
        outs.append(tmp_path / str(i) / "out")
        dk.merge(data, outs[-1], threads=threads, tile=tile, force=True)
    first = families.contents(outs[0])
    assert "model.safetensors" in first
    for out in outs[1:]:
        assert families.contents(out) == first


@pytest.mark.parametrize("method", METHODS)
def test_shards_and_the_order_of_tensors_do_not_matter(llamas, tmp_path, method):
    rng = np.random.default_rng(5)
    for shards, where in ((1, tmp_path / "one"), (9, tmp_path / "nine"), (1, tmp_path / "mixed")):
        for name, tensors in (("base", llamas.base), *((f"m{i}", m) for i, m in enumerate(llamas.models))):
            names = list(tensors)
            if where.name == "mixed":
                rng.shuffle(names)
            families.save(where / name, {n: tensors[n] for n in names}, families.config(), shards=shards)
        dk.merge(families.recipe(where, **METHODS[method]), where / "out", force=True)
    weights = [(tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("one", "nine", "mixed")]
    assert weights[0] == weights[1] == weights[2]
    locks = [lock_of(tmp_path / name / "out") for name in ("one", "nine", "mixed")]
    for key in ("sample_digest", "content_digest"):
        found = [[entry[key] for entry in lock["inputs"]] for lock in locks]
        assert found[0] == found[1] == found[2] and None not in found[0]
    assert len({lock["output"]["content_digest"] for lock in locks}) == 1


def test_output_shards_hold_the_same_tensors(llamas, tmp_path, real):
    data = families.recipe(llamas.path, sparsify=DARE)
    dk.merge(data, tmp_path / "one")
    dk.merge(data, tmp_path / "many", shard_size=10_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    families.same(families.load(tmp_path / "many"), families.load(tmp_path / "one"))
    if real.kind == "llama":
        dk.merge(families.recipe(real.path, sparsify=DARE), tmp_path / "sharded", shard_size=10_000)
        assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
        loaded(real, tmp_path / "sharded")


def jobs_of(llamas, sparsify, shard_size=1 << 30):
    """The engine's jobs for a merge."""
    recipe = read_recipe(families.recipe(llamas.path, sparsify=sparsify))
    with contextlib.ExitStack() as stack:
        names = ("base", *(f"m{k}" for k in range(len(recipe.models))))
        opened = [contextlib.closing(open_checkpoint(llamas.path / name)) for name in names]
        base, *models = [stack.enter_context(one) for one in opened]
        return [execution.Job([step], LEAF) for step in make_plan(recipe, base, models, shard_size=shard_size).steps]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_take_spans_of_different_files(llamas, threads):
    """As long as there are that many; and every span once."""
    jobs = jobs_of(llamas, DARE, shard_size=10_000)
    expected = sorted((id(job), *span) for job in jobs for span in job.spans)
    left = Counter(job.steps[0].output for job in jobs for _ in job.spans)
    assert len(left) > 3
    rng = np.random.default_rng(threads)
    queue, found, writes = execution.Queue(jobs), [], {}
    while left.total():
        thread = int(rng.integers(threads))  # some are faster
        others = {file for one, file in writes.items() if one != thread}
        free = {file for file, count in left.items() if count} - others
        job, begin, end = queue.take(thread)
        found.append((id(job), begin, end))
        writes[thread] = job.steps[0].output
        left[writes[thread]] -= 1
        assert writes[thread] in free or not free
    assert sorted(found) == expected
    assert queue.take(0) is None


def test_what_one_thread_must_do_alone_comes_first_and_largest_first(llamas):
    alone = jobs_of(llamas, {"method": "magnitude", "drop_rate": 0.5})
    shared = jobs_of(llamas, DARE)
    assert not any(job.divisible for job in alone) and all(job.divisible for job in shared)
    queue = execution.Queue([*shared, *alone])
    taken = [queue.take(None)[0] for _ in range(len(alone) + len(shared))]
    assert [job.cost for job in taken[: len(alone)]] == sorted((job.cost for job in alone), reverse=True)
    assert all(job.divisible for job in taken[len(alone) :])


def test_masks_follow_the_model_when_the_order_changes(llamas, tmp_path):
    data = families.recipe(llamas.path, sparsify=DARE, dtype="float32")
    dk.merge(data, tmp_path / "a")
    data["models"].reverse()
    dk.merge(data, tmp_path / "b")
    assert lock_of(tmp_path / "a")["effective_seeds"] == lock_of(tmp_path / "b")["effective_seeds"][::-1]
    a, b = families.load(tmp_path / "a"), families.load(tmp_path / "b")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(a[name]).max())
    dk.merge(data, tmp_path / "c", seed=1)
    assert np.abs(families.load(tmp_path / "c")["lm_head.weight"] - b["lm_head.weight"]).max() > 1e-3


# --- tied weights


def test_a_tied_base_and_an_untied_model_give_an_untied_output(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng, tied=True)
    model = families.tuned(rng, base)
    head = families.tuned(rng, {"lm_head.weight": base["model.embed_tokens.weight"]})
    families.save(tmp_path / "base", base, families.config(tied=True))
    families.save(tmp_path / "m0", model | head, families.config(tied=False))
    for k, (name, seed) in enumerate((("dropped", 4), ("m0", None))):
        rate = 0.6 if k == 0 else 0.0
        report = dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / f"out{k}", drop_rate=rate, seed=seed)
        assert any("untied" in note for note in report.notes)
        config = json.loads((tmp_path / f"out{k}" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        found = families.load(tmp_path / f"out{k}")
        untied = base | {"lm_head.weight": base["model.embed_tokens.weight"]}
        if name == "m0":
            families.same(found, model | head)
        else:
            families.same(found, formulas(untied, [model | head], [4], sparsify=("dare", {"drop_rate": 0.6})))


def test_an_untied_base_and_a_tied_model_give_an_untied_output(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    model = families.tuned(rng, base)
    del model["lm_head.weight"]
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    families.save(tmp_path / "base", base, families.config(tied=False))
    families.save(tmp_path / "m0", model, families.config(tied=True))
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0)
    found = families.load(tmp_path / "out")
    families.same(found, model | {"lm_head.weight": model["model.embed_tokens.weight"]})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_stored_twice_is_left_out_of_a_tied_output(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng, tied=True)
    model = families.tuned(rng, base)
    families.save(tmp_path / "base", base, families.config(tied=True))
    twice = model | {"lm_head.weight": model["model.embed_tokens.weight"]}
    families.save(tmp_path / "m0", twice, families.config(tied=True))
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0)
    families.same(families.load(tmp_path / "out"), model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("kind", "tied"), [("gemma2", True), ("mistral", False)])
def test_a_config_that_does_not_say_whether_the_head_is_tied_means_what_its_kind_means(tmp_path, kind, tied):
    """Of a head that is stored and equals the embedding; one that differs is a head of its own in either case."""
    rng = np.random.default_rng(0)
    config = families.config() | {"model_type": kind, "architectures": None}
    del config["tie_word_embeddings"]
    base = families.llama(rng)
    model = families.tuned(rng, base)
    for own in (True, False):
        for name, tensors in (("base", base), ("m0", model)):
            head = {} if own else {"lm_head.weight": tensors["model.embed_tokens.weight"]}
            families.save(tmp_path / name, tensors | head, config)
        dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0, overwrite=True)
        found = families.load(tmp_path / "out")
        if own:
            families.same(found, model)
            said = json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings")
            assert said is (False if tied else None)
        else:
            assert ("lm_head.weight" in found) == (not tied)


# --- vocabularies


HEADS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def grown(tmp_path):
    """96 rows in the base; m0 has 97, m1 has 96, m2 has 95."""
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    families.save(tmp_path / "base", base, families.config())
    models = []
    for i, rows in enumerate((97, 96, 95)):
        model = families.tuned(rng, base)
        for name in HEADS:
            extra = rng.normal(0, 0.05, (2, families.HIDDEN)).astype(BF16)
            model[name] = np.concatenate([model[name], extra])[:rows]
        families.save(tmp_path / f"m{i}", model, families.config(vocab=rows))
        models.append(model)
    return tmp_path, base, models


def test_vocabularies_that_differ_are_refused_with_the_choices(grown, tmp_path):
    path, _, _ = grown
    with pytest.raises(HomologyError) as error:
        dk.merge(families.recipe(path), tmp_path / "out")
    for word in ("97 rows in m0", "96 rows in base", "95 rows in m2", "vocab: base", "vocab: pad", *HEADS):
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("vocab", ["base", "pad"])
def test_rows_beyond_the_common_vocabulary(grown, tmp_path, vocab):
    path, base, models = grown
    dk.merge(families.recipe(path, vocab=vocab, sparsify={"method": "dare", "drop_rate": 0.5}), tmp_path / "out")
    seeds = lock_of(tmp_path / "out")["effective_seeds"]
    found = families.load(tmp_path / "out")
    rows = {"base": 96, "pad": 97}[vocab]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    for name in HEADS:
        assert found[name].shape == (rows, families.HIDDEN)
        cut = [np.concatenate([m[name], base[name][len(m[name]) :]])[:96] for m in models]  # missing rows: the base's
        how = {"seeds": seeds, "sparsify": ("dare", {"drop_rate": 0.5}), "method": "task_arithmetic"}
        families.same({name: found[name][:96]}, {name: oracle.merge(name, base[name], cut, **how)})
        if vocab == "pad":
            assert found[name][96].tobytes() == models[0][name][96].tobytes()  # only m0 has it
    assert lock_of(tmp_path / "out")["inputs"][1]["content_digest"] is not None


@pytest.mark.parametrize(("vocab", "rows"), [("base", 96), ("pad", 97)])
def test_drop_of_a_model_with_one_more_row_says_how_many_rows_there_are(grown, tmp_path, dare, vocab, rows):
    path, _, models = grown
    result = dare("drop", path / "base", path / "m0", tmp_path / "out", "-p", "0", "--vocab", vocab)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    expected = {name: array[:rows] if name in HEADS else array for name, array in models[0].items()}
    families.same(families.load(tmp_path / "out"), expected)


def test_rows_of_another_embedding_are_not_the_vocabularys(tmp_path):
    """The config's vocab_size counts tokens, and not the rows of whatever else is called an embedding."""
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    for name, tensors, rows in (("base", base, 5), ("m0", families.tuned(rng, base), 7)):
        families.save(
            tmp_path / name, tensors | {"model.embed_codes.weight": np.ones((rows, 4), BF16)}, families.config()
        )
    dk.merge(families.recipe(tmp_path, k=1, vocab="pad"), tmp_path / "out")
    assert families.load(tmp_path / "out")["model.embed_codes.weight"].shape == (7, 4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == families.VOCAB


@pytest.mark.parametrize("vocab", ["base", "pad"])
def test_a_tokenizer_from_the_one_model_comes_with_a_config_that_is_true(grown, tmp_path, vocab):
    path, _, _ = grown
    dk.merge(families.recipe(path, k=1, vocab=vocab, tokenizer_source=str(path / "m0")), tmp_path / "out")
    rows = len(families.load(tmp_path / "out")[HEADS[0]])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows


def test_missing_rows_are_the_bases_when_whole_models_are_measured(grown, tmp_path):
    """m2 lacks row 95: which half of its weights is the larger one is asked with the base's row."""
    path, base, models = grown
    sparsify = {"method": "magnitude", "drop_rate": 0.5, "on": "weights"}
    dk.merge(families.recipe(path, vocab="base", merge_method="linear", sparsify=sparsify), tmp_path / "out", threads=1)
    found = families.load(tmp_path / "out")
    for name in HEADS:
        cut = [np.concatenate([m[name], base[name][len(m[name]) :]])[:96] for m in models]
        how = {"seeds": [0] * 3, "sparsify": ("magnitude", {"drop_rate": 0.5}), "method": "linear", "on": "weights"}
        families.same({name: found[name]}, {name: oracle.merge(name, base[name], cut, **how)})


def test_missing_rows_are_the_bases_when_whole_models_are_averaged(grown, tmp_path):
    """m2 lacks row 95: on weights and in an unnormalised sum it counts as the base's, not as zeros."""
    path, base, _models = grown
    data = families.recipe(path, vocab="base", merge_method="linear", dtype="float32")
    data["models"] = data["models"][2:]
    plain = families.load(path / "m2")[HEADS[0]].astype(np.float32)
    for name, keys in {
        "normalized": {},
        "unnormalised": {"parameters": {"normalize": False}},
        "weights": {"sparsify": {"method": "drop_only", "drop_rate": 0.0, "on": "weights"}},
    }.items():
        dk.merge(data | keys, tmp_path / name)
        found = families.load(tmp_path / name)[HEADS[0]]
        assert np.array_equal(found[:95], plain)
        assert np.array_equal(found[95], base[HEADS[0]][95].astype(np.float32)), name


def test_content_digest_counts_the_rows_that_are_cut_off(tmp_path, monkeypatch):
    """The fingerprint of an input does not depend on how its tensors are cut for the threads."""
    from darekit.engine import execution

    rng = np.random.default_rng(0)
    base = {"model.embed_tokens.weight": rng.normal(0, 0.05, (4096, 48)).astype(BF16)}
    model = {"model.embed_tokens.weight": rng.normal(0, 0.05, (4100, 48)).astype(BF16)}
    families.save(tmp_path / "base", base, families.config())
    families.save(tmp_path / "m0", model, families.config())
    digests = []
    for span in (execution.SPAN, 65536):
        monkeypatch.setattr(execution, "SPAN", span)
        out = tmp_path / f"out{span}"
        dk.merge(families.recipe(tmp_path, k=1, vocab="base"), out, force=True)
        digests.append(lock_of(out)["inputs"][1]["content_digest"])
    assert digests[0] == digests[1] or digests[1] is None  # none is honest, another one is not


# --- scopes


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("embeddings", lambda n: n == "model.embed_tokens.weight"),
        ("heads", lambda n: n == "lm_head.weight"),
        ("norms", lambda n: "norm" in n),
        ("model.layers.1.*", lambda n: n.startswith("model.layers.1.")),
        ("*.q_proj.weight", lambda n: n.endswith("q_proj.weight")),
    ],
)
def test_keep_dense_leaves_these_tensors_as_the_model_has_them(llamas, tmp_path, entry, names):
    dk.drop(llamas.path / "base", llamas.path / "m0", tmp_path / "out", drop_rate=0.8, seed=1, keep_dense=[entry])
    model = llamas.models[0]
    dense = {n: a for n, a in model.items() if names(n)}
    assert dense
    found = families.load(tmp_path / "out")
    families.same({n: found[n] for n in dense}, dense)
    dropped = formulas(llamas.base, [model], [1], sparsify=("dare", {"drop_rate": 0.8}))
    families.same({n: a for n, a in found.items() if n not in dense}, {n: dropped[n] for n in found if n not in dense})


def test_biases_are_a_group(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng) | {"model.layers.0.self_attn.q_proj.bias": rng.normal(0, 0.1, 32).astype(BF16)}
    model = families.tuned(rng, base, 0.01)
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "m0", model)
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=1, keep_dense=["biases"])
    found = families.load(tmp_path / "out")
    for name in base:
        source = model if group_of(name, base[name].shape) == "biases" else base
        families.same({name: found[name]}, {name: source[name]})


def test_values_per_tensor_and_per_model(llamas, tmp_path):
    rate = [{"filter": "mlp", "value": 0.9}, {"filter": "*.norm.weight", "value": 0.0}, {"value": 0.3}]
    weight = [{"filter": "lm_head", "value": 0.5}, {"value": 2.0}]
    data = families.recipe(llamas.path, k=2, sparsify={"method": "dare", "drop_rate": rate})
    data["models"][1]["parameters"] = {"drop_rate": 0.5, "weight": weight, "seed": 9}
    dk.merge(data, tmp_path / "out", force=True)
    seeds = lock_of(tmp_path / "out")["effective_seeds"]
    assert seeds[1] == 9
    found = families.load(tmp_path / "out")
    for name, array in llamas.base.items():
        first = 0.9 if "mlp" in name else 0.0 if name == "model.norm.weight" else 0.3
        factor = 0.5 if "lm_head" in name else 2.0
        deltas = []
        for model, seed, p in zip(llamas.models, seeds, (first, 0.5), strict=False):
            delta = model[name].astype(np.float32) - array.astype(np.float32)
            kept = masks.kept(seed, masks.stream_of(name), 0, array.size, p).reshape(array.shape)
            deltas.append(np.where(kept, delta * np.float32(1 / (1 - p)), np.float32(0)))
        change = deltas[0] + np.float32(factor) * deltas[1]
        expected = np.where(change == 0, array, (array.astype(np.float32) + change).astype(BF16))
        families.same({name: found[name]}, {name: expected})


def test_a_filter_without_a_match_is_refused_while_planning(llamas, tmp_path):
    data = families.recipe(llamas.path, sparsify={"method": "dare", "drop_rate": [{"filter": "mlp", "value": 0.5}]})
    with pytest.raises(RecipeError, match="no drop_rate for tensor"):
        dk.merge(data, tmp_path / "out")


# --- number formats


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("to", ["bfloat16", "float16", "float32", "float8_e5m2"])
def test_input_and_output_formats(tmp_path, kind, to):
    base, models = families.family(tmp_path, kind=families.KINDS[kind], k=2)
    dk.merge(families.recipe(tmp_path, k=2, sparsify=DARE, out_dtype=to), tmp_path / "out")
    seeds = lock_of(tmp_path / "out")["effective_seeds"]
    found = families.load(tmp_path / "out")
    number = np.float64 if kind == "F64" else np.float32
    target = np.dtype(families.KINDS[families.NAMES[to]])
    for name, array in base.items():
        change = np.zeros(array.shape, number)
        for model, seed in zip(models, seeds, strict=True):
            delta = model[name].astype(number) - array.astype(number)
            kept = masks.kept(seed, masks.stream_of(name), 0, array.size, 0.7).reshape(array.shape)
            change += np.where(kept, delta * number(np.float32(1 / (1 - 0.7))), 0)
        expected = (array.astype(number) + change).astype(target)
        families.same({name: found[name]}, {name: expected})
    said = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
    assert said == ("bfloat16" if to == "float8_e5m2" else to)  # torch loads 8 bits into another format


def test_formats_may_differ_between_base_and_model(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng, np.float32)
    model = {n: a.astype(BF16) for n, a in families.tuned(rng, base).items()}
    families.save(tmp_path / "base", base, families.config(dtype="float32"))
    families.save(tmp_path / "m0", model, families.config())
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0)
    families.same(families.load(tmp_path / "out"), {n: a.astype(np.float32) for n, a in model.items()})


def one_tensor(tmp_path, base, *models, name="model.layers.0.mlp.up_proj.weight", **keys):
    """Checkpoints of one tensor each, and the recipe that merges them."""
    families.save(tmp_path / "base", {name: base})
    for i, model in enumerate(models):
        families.save(tmp_path / f"m{i}", {name: model})
    return families.recipe(tmp_path, k=len(models), **keys)


@pytest.mark.parametrize(("kind", "to", "limit"), [("F32", "float16", 65504), ("F32", "float8_e4m3fn", 448)])
def test_overflow_of_the_output_format_is_counted(tmp_path, kind, to, limit):
    base = np.full((100, 10), limit, np.float32)
    model = base.copy()
    model[3, :7] *= 1.2
    data = one_tensor(tmp_path, base, model, dtype=to)
    with pytest.raises(DataError, match=r"up_proj.weight: 7 values") as error:
        dk.merge(data, tmp_path / "out")
    assert "bfloat16" in str(error.value) and not (tmp_path / "out").exists()
    data = one_tensor(tmp_path, base, base * np.float32(0.999), dtype=to)
    dk.merge(data, tmp_path / "out")
    assert np.isfinite(families.load(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].astype(np.float32)).all()


# --- integers, NaN and Inf


@pytest.mark.parametrize("kind", ["I64", "BOOL", "U8"])
def test_integer_tensors_are_copied_or_refused(llamas, tmp_path, kind):
    counts = (np.arange(3_000_000) % 2).astype(families.KINDS[kind])
    for name, tensors in (("base", llamas.base), ("m0", llamas.models[0])):
        families.save(tmp_path / name, tensors | {"model.steps": counts}, families.config())
    dk.merge(families.recipe(tmp_path, k=1, sparsify=DARE, dtype="float32"), tmp_path / "out")
    families.same({"s": families.load(tmp_path / "out")["model.steps"]}, {"s": counts})
    for at in (5, counts.size - 1):  # in what planning samples, and beyond it
        other = counts.copy()
        other[at] = 1 - other[at]
        families.save(tmp_path / "m0", llamas.models[0] | {"model.steps": other}, families.config())
        with pytest.raises(DataError, match=r"model\.steps") as error:
            dk.merge(families.recipe(tmp_path, k=1, sparsify=DARE), tmp_path / "second")
        assert "m0" in str(error.value) and "quantised" in str(error.value)
        assert not (tmp_path / "second").exists()


@pytest.fixture
def spoilt(tmp_path, llamas):
    """NaN and Inf in the base (2), in m0 (3, two tensors) and none in m1."""
    base = {n: a.copy() for n, a in llamas.base.items()}
    models = [{n: a.copy() for n, a in m.items()} for m in llamas.models[:2]]
    base["model.norm.weight"][[1, 2]] = np.nan
    models[0]["lm_head.weight"][5, :2] = np.inf
    models[0]["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    for name, tensors in (("base", base), *((f"m{i}", m) for i, m in enumerate(models))):
        families.save(tmp_path / name, tensors, families.config())
    return tmp_path, base, models


@pytest.mark.parametrize("keys", [{}, {"sparsify": DARE}, METHODS["ties"], METHODS["trim_model"], METHODS["della"]])
def test_nan_and_inf_are_all_listed_and_nothing_is_published(spoilt, tmp_path, keys):
    path, _, _ = spoilt
    with pytest.raises(DataError) as error:
        dk.merge(families.recipe(path, k=2, **keys), tmp_path / "out", force=True)
    lines = str(error.value).splitlines()
    assert sum("base: model.norm.weight: 2 values" in line for line in lines) == 1
    assert sum(line.endswith("m0: lm_head.weight: 2 values") for line in lines) == 1
    assert sum(line.endswith("m0: model.layers.1.mlp.up_proj.weight: 1 values") for line in lines) == 1
    assert not any("m1" in line for line in lines) and "--allow-nonfinite" in lines[-1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "m0", "m1"], "nothing is left behind"


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_allow_nonfinite_takes_the_bases_element(spoilt, tmp_path, method):
    path, base, models = spoilt
    dk.merge(families.recipe(path, k=2, merge_method=method), tmp_path / "out", allow_nonfinite=True)
    found = families.load(tmp_path / "out")
    expected = formulas(base, models, [0, 0], method=method)
    for name, array in base.items():
        bad = ~np.isfinite(array.astype(np.float32))
        for model in models:
            bad |= ~np.isfinite(model[name].astype(np.float32))
        families.same({name: found[name]}, {name: np.where(bad, array, expected[name])})


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_allow_nonfinite_takes_the_bases_element_wherever_either_model_has_none(llamas, tmp_path, method):
    name = "model.norm.weight"
    models = [{n: a.copy() for n, a in m.items()} for m in llamas.models[:2]]
    models[0][name][3], models[1][name][8] = np.nan, np.inf
    families.save(tmp_path / "base", llamas.base, families.config())
    for i, model in enumerate(models):
        families.save(tmp_path / f"m{i}", model, families.config())
    dk.merge(families.recipe(tmp_path, k=2, merge_method=method), tmp_path / "out", allow_nonfinite=True)
    expected = formulas(llamas.base, models, [0, 0], method=method)
    expected[name][[3, 8]] = llamas.base[name][[3, 8]]
    families.same(families.load(tmp_path / "out"), expected)


@pytest.mark.parametrize("keys", [{"parameters": {"normalize": False}}, {"sparsify": {**DARE, "on": "weights"}}])
def test_allow_nonfinite_takes_the_bases_element_when_whole_models_are_merged(tmp_path, keys):
    base, model = np.full(100, 2, np.float32), np.full(100, 3, np.float32)
    model[[4, 70]] = np.nan
    data = one_tensor(tmp_path, base, model, merge_method="linear", **keys)
    dk.merge(data, tmp_path / "out", allow_nonfinite=True, force=True)
    (found,) = families.load(tmp_path / "out").values()
    assert found[[4, 70]].tolist() == [2, 2]


def test_allow_nonfinite_without_a_base_is_refused(tmp_path):
    model = np.ones(100, np.float32)
    data = one_tensor(tmp_path, model, model, merge_method="linear")
    del data["base_model"]
    with pytest.raises(PlanError, match="no base"):
        dk.merge(data, tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(PlanError, match="needs a base"):
        dk.merge_tensors(None, [{"w": model}] * 2, allow_nonfinite=True)


# --- the forms of a recipe


def test_linear_works_without_a_base(real, tmp_path):
    data = families.recipe(real.path, merge_method="linear")
    del data["base_model"]
    for entry, weight in zip(data["models"], (1.0, 2.0, 5.0), strict=True):
        entry["parameters"] = {"weight": weight}
    dk.merge(data, tmp_path / "out")
    models = [families.load(real.path / f"m{i}") for i in range(3)]
    expected = {n: oracle.merge(n, None, [m[n] for m in models], seeds=[0] * 3, weights=(1, 2, 5)) for n in models[0]}
    families.same(families.load(tmp_path / "out"), expected)
    loaded(real, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    first = json.loads((real.path / "m0" / "config.json").read_text())
    assert config["architectures"] == first["architectures"]


@pytest.mark.parametrize(
    ("method", "parameters", "weight"),
    [
        ("task_arithmetic", {"lambda": 0.5}, 1.0),
        ("task_arithmetic", {}, 0.5),
        ("task_arithmetic", {"lambda": 0.5}, 2.0),  # which is the model itself
        ("ties", {"lambda": 0.5}, 1.0),
    ],
)
def test_a_lone_model_that_is_not_sparsified_is_still_scaled(llamas, tmp_path, method, parameters, weight):
    data = families.recipe(llamas.path, k=1, merge_method=method, parameters=parameters)
    data["models"][0]["parameters"] = {"weight": weight}
    dk.merge(data, tmp_path / "out")
    how = {"method": method, "lambda_": parameters.get("lambda", 1.0), "weights": [weight]}
    expected = formulas(llamas.base, llamas.models[:1], [0], **how)
    families.same(families.load(tmp_path / "out"), expected)
    scaled = any(array.tobytes() != llamas.models[0][name].tobytes() for name, array in expected.items())
    assert scaled is (how["lambda_"] * weight != 1)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_lone_model_without_a_base_is_still_scaled(llamas, tmp_path, weight):
    data = families.recipe(llamas.path, k=1, merge_method="linear", parameters={"normalize": False})
    data["models"][0]["parameters"] = {"weight": weight}
    del data["base_model"]
    dk.merge(data, tmp_path / "out")
    expected = {name: (array.astype(np.float32) * weight).astype(BF16) for name, array in llamas.models[0].items()}
    families.same(families.load(tmp_path / "out"), expected)


def test_an_unnormalised_sum_of_models_is_a_sum_of_weights_and_not_of_deltas(tmp_path):
    rng = np.random.default_rng(0)
    base, one, two = (rng.normal(0, 1, (4, 8)).astype(np.float32) for _ in range(3))
    data = one_tensor(tmp_path, base, one, two, merge_method="linear", parameters={"normalize": False})
    for entry, weight in zip(data["models"], (0.5, 0.25), strict=True):
        entry["parameters"] = {"weight": weight}
    dk.merge(data, tmp_path / "out", force=True)
    (found,) = families.load(tmp_path / "out").values()
    assert np.array_equal(found, np.float32(0.5) * one + np.float32(0.25) * two)


@pytest.mark.parametrize("method", ["drop_only", "dare", "magnitude"])
def test_on_weights_drops_from_the_weights_themselves(llamas, tmp_path, dare, method):
    out = tmp_path / "out"
    result = dare(
        "drop", llamas.path / "base", llamas.path / "m0", out, "-p", "0.5", "--method", method, "--on", "weights",
        "--seed", "5",
    )  # fmt: skip
    assert result.code == 0, result.err
    expected = formulas(
        llamas.base, llamas.models[:1], [5], sparsify=(method, {"drop_rate": 0.5}), method="linear", on="weights"
    )
    families.same(families.load(out), expected)
    assert np.count_nonzero(expected["lm_head.weight"].astype(np.float32)) < 0.6 * expected["lm_head.weight"].size


def test_weights_without_a_base_are_dropped_on_the_rows_that_all_models_have(grown, tmp_path):
    path, _, models = grown
    data = families.recipe(
        path, k=2, merge_method="linear", vocab="pad",
        sparsify={"method": "drop_only", "drop_rate": 0.5, "on": "weights"},
    )  # fmt: skip
    del data["base_model"]
    dk.merge(data, tmp_path / "out")
    seeds = lock_of(tmp_path / "out")["effective_seeds"]
    found = families.load(tmp_path / "out")
    for name, array in found.items():
        cut = [m[name][:96] for m in models[:2]]
        expected = oracle.merge(name, None, cut, seeds=seeds, sparsify=("drop_only", {"drop_rate": 0.5}))
        families.same({name: array[:96]}, {name: expected})
        if name in HEADS:
            assert array[96].tobytes() == models[0][name][96].tobytes()


def test_an_unnormalised_sum_of_models_does_not_go_with_sparse_deltas(llamas, tmp_path):
    """Half a delta method, half a weight method: dropping would hit the weights themselves."""
    data = families.recipe(llamas.path, sparsify=DARE, merge_method="linear", parameters={"normalize": False})
    with pytest.raises(RecipeError, match="task_arithmetic"):
        dk.merge(data, tmp_path / "out")


PAIRS = {
    "dare_ties": {"sparsify": {"method": "dare"}, "merge_method": "ties",
                  "parameters": {"normalize": False, "keep": 1.0}},
    "dare_linear": {"sparsify": {"method": "dare"}, "merge_method": "task_arithmetic"},
    "della": {"sparsify": {"method": "della", "window": 0.3}, "merge_method": "ties"},
    "della_linear": {"sparsify": {"method": "della", "window": 0.3}, "merge_method": "task_arithmetic"},
    "breadcrumbs": {"sparsify": {"method": "breadcrumbs"}, "merge_method": "task_arithmetic"},
    "breadcrumbs_ties": {"sparsify": {"method": "breadcrumbs"}, "merge_method": "ties",
                         "parameters": {"normalize": False}},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_mergekits_form_equals_the_native_one(llamas, tmp_path, name):
    theirs = families.recipe(llamas.path, merge_method=name, parameters={"density": 0.3, "lambda": 0.8})
    dk.merge(theirs, tmp_path / "theirs", force=True)
    pair = PAIRS[name]
    ours = families.recipe(
        llamas.path,
        sparsify=pair["sparsify"] | {"drop_rate": 0.7},
        merge_method=pair["merge_method"],
        parameters={"lambda": 0.8} | pair.get("parameters", {}),
    )
    dk.merge(ours, tmp_path / "ours", force=True)
    found, expected = families.load(tmp_path / "theirs"), families.load(tmp_path / "ours")
    if name.startswith("breadcrumbs"):  # counts from density as written against n - int(p n): at most one element
        for key, array in expected.items():
            assert np.count_nonzero(found[key] != array) <= 3, key
    else:
        families.same(found, expected)
    assert any((found[key] != array).any() for key, array in llamas.base.items())


def test_mergekits_ties_reads_density_as_keep(llamas, tmp_path):
    theirs = families.recipe(llamas.path, merge_method="ties", parameters={"density": 0.3, "weight": 1.0})
    dk.merge(theirs, tmp_path / "theirs")
    dk.merge(families.recipe(llamas.path, **{"merge_method": "ties", "parameters": {"keep": 0.3}}), tmp_path / "ours")
    found = families.load(tmp_path / "theirs")
    families.same(found, families.load(tmp_path / "ours"))
    families.same(found, formulas(llamas.base, llamas.models, [0] * 3, method="ties", keep=0.3))


def test_the_written_recipe_repeats_the_run(llamas, tmp_path):
    data = families.recipe(llamas.path, sparsify=DARE | {"seed": 5}, merge_method="ties", parameters={"keep": 0.4})
    dk.merge(data, tmp_path / "one")
    dk.merge(tmp_path / "one" / "darekit_recipe.yaml", tmp_path / "two")
    families.same(families.load(tmp_path / "two"), families.load(tmp_path / "one"))
    lock = lock_of(tmp_path / "one")
    dk.merge(lock["recipe"], tmp_path / "three")
    families.same(families.load(tmp_path / "three"), families.load(tmp_path / "one"))
    assert lock["version"] == dk.__version__ and len(lock["inputs"]) == 4


def test_memory_and_disk_agree(llamas, tmp_path):
    dk.merge(
        families.recipe(llamas.path, sparsify=DARE, merge_method="ties", parameters={"keep": 0.4}), tmp_path / "out"
    )
    seeds = lock_of(tmp_path / "out")["effective_seeds"]
    merged = dk.merge_tensors(llamas.base, llamas.models, sparsify=dk.dare(0.7), method=dk.ties(keep=0.4), seeds=seeds)
    families.same(families.load(tmp_path / "out"), merged)


def test_a_checkpoint_may_be_one_file(llamas, tmp_path, dare):
    file = llamas.path / "m0" / "model.safetensors"
    result = dare("drop", llamas.path / "base", file, tmp_path / "out", "-p", "0", "--json")
    assert result.code == 0, result.err
    families.same(families.load(tmp_path / "out"), llamas.models[0])


def test_a_missing_checkpoint_is_named(llamas, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        dk.drop(llamas.path / "base", llamas.path / "nowhere", tmp_path / "out", drop_rate=0.5)


def test_weights_alone_take_the_bases_config_and_tokenizer(real, tmp_path):
    """A model directory with nothing but weights: the output still loads."""
    (tmp_path / "bare").mkdir()
    for path in (real.path / "m0").glob("*.safetensors"):
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    dk.drop(real.path / "base", tmp_path / "bare", tmp_path / "out", drop_rate=0.5)
    assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / "tokenizer.json").exists()


def test_memory_takes_any_byte_order():
    base = {"w": np.linspace(-1, 1, 40, dtype=np.float32)}
    tuned = {"w": base["w"] + np.float32(0.25)}
    expected = dk.merge_tensors(base, [tuned], method="task_arithmetic")
    found = dk.merge_tensors(
        {"w": base["w"].astype(">f4")}, [{"w": tuned["w"].astype(">f4")}], method="task_arithmetic"
    )
    assert np.array_equal(found["w"], expected["w"]) and np.array_equal(found["w"], tuned["w"])


@pytest.mark.parametrize(
    ("base", "models", "says"),
    [
        ({"w": [1.0, 2.0]}, [{"w": np.zeros(2, np.float32)}], r"base: w must be a numpy array .* found list"),
        ({"w": np.zeros(2, np.float32)}, [[1.0, 2.0]], r"model 0 must be a dict of name -> array; found list"),
        ({"w": np.zeros(2, np.complex128)}, [{"w": np.zeros(2, np.complex128)}], "number format complex128"),
    ],
)
def test_memory_refuses_what_is_no_tensor(base, models, says):
    with pytest.raises(dk.DarekitError, match=says):
        dk.merge_tensors(base, models)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": dk.ties}, r"method must be a name, or .* dk.ties\(\); found the function ties itself"),
        ({"method": 5}, r"method must be a name, .* found int \(5\)"),
        ({"sparsify": "dare"}, r"sparsify must be what .* dk.dare\(0.9\); found str \('dare'\)"),
        ({"sparsify": dk.ties()}, "sparsify must be what .* found Method"),
        ({"models": None}, "models must be a list of dicts, one per model; found NoneType"),
        ({"models": iter(())}, "models must be a list of dicts, one per model; found tuple_iterator"),
        ({"models": [{1: np.zeros(2, np.float32)}]}, "model 0 has a tensor named 1; expected strings, such as"),
        ({"models": [{"\ud800": np.zeros(2, np.float32)}]}, r"model 0: the name '\\ud800' is not valid Unicode"),
        ({"base": {}, "models": [{}]}, "model 0 is empty: expected at least one tensor"),
        ({"weights": 1.0}, r"weights must be a list, one for each model; found float \(1.0\)"),
        ({"seeds": 5}, r"seeds must be a list, one for each model; found int \(5\)"),
        ({"statistics": "a.fisher.safetensors"}, "statistics must be a list, one for each model; found str"),
    ],
)
def test_memory_says_what_was_given_in_the_wrong_place(options, says):
    """Slips of the hand are errors of darekit's, not AttributeErrors from within."""
    given = {"base": {"w": np.zeros(2, np.float32)}, "models": [{"w": np.ones(2, np.float32)}], **options}
    with pytest.raises(dk.DarekitError, match=says):
        dk.merge_tensors(given.pop("base"), given.pop("models"), **given)


def test_one_group_is_kept_dense_by_its_name_alone():
    """As in a recipe; before, a word counted as its letters."""
    assert dk.dare(0.5, keep_dense="norms") == dk.dare(0.5, keep_dense=["norms"])
    recipe = drop_recipe("base", "model", drop_rate=0.5, keep_dense="norms")
    assert recipe.sparsify.keep_dense == ("norms",)


def test_memory_refuses_torch_tensors_without_values_and_sparse_ones():
    torch = pytest.importorskip("torch")
    base = {"w": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"model 0: w has no values \(it is on torch's device meta\)"):
        dk.merge_tensors(base, [{"w": torch.zeros(2, 2, device="meta")}])
    with pytest.raises(CheckpointError, match="model 0: w is sparse; expected a dense tensor"):
        dk.merge_tensors(base, [{"w": torch.ones(2, 2).to_sparse()}])
    negative = dk.merge_tensors(base, [{"w": torch._neg_view(torch.ones(2, 2))}])
    assert negative["w"].tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dk.read_recipe({"models": ["a"]}, settings=["a=1"]), "settings must be a dict, dotted key -> value"),
        (lambda: dk.read_recipe({"models": ["a"]}, settings={5: 1}), "settings must be a dict, dotted key -> value"),
        (lambda: dk.pack("base", "math", "a.safetensors", drop_rate=0.5, bits="4"), "'4' bits: expected one of 64"),
        (lambda: dk.pack("base", "math", "a.safetensors", drop_rate=0.5, bits=4, group=1.5), "groups of 1.5 elements"),
    ],
)
def test_slips_of_the_hand_are_errors_of_darekits(call, says):
    with pytest.raises(dk.DarekitError, match=says):
        call()


def test_a_switcher_says_what_it_takes(llamas):
    with pytest.raises(HomologyError, match="found str where a live model is expected: a torch module, or name -> "):
        dk.Switcher("base", llamas.path / "base")


@pytest.mark.parametrize("name", ["threads", "tile"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_memory_takes_whole_numbers_of_threads_and_elements(name, value):
    tensors = {"w": np.zeros(2, np.float32)}
    with pytest.raises(TypeError, match=f"{name} must be a whole number above 0, found {value!r}"):
        dk.merge_tensors(tensors, [tensors], **{name: value})


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: dk.pack(folder / "base", folder / "m0", "never.safetensors", drop_rate=0.5, threads=-1),
        lambda folder: dk.inspect(folder / "base", folder / "m0", threads=-1),
        lambda folder: dk.Switcher({}, folder / "base", threads=-1),
        lambda folder: dk.extract(folder / "base", folder / "m0", "never", rank=1, threads=-1),
    ],
)
def test_threads_are_whole_numbers_everywhere(llamas, call):
    with pytest.raises(TypeError, match="threads must be a whole number above 0, found -1"):
        call(llamas.path)
    assert not Path("never").exists() and not Path("never.safetensors").exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "odd"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_processors_is_known(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cpu_quota(tmp_path) == expected


def test_no_more_threads_than_a_container_may_use(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for quota, expected in ((None, 8), (3, 3), (0, 8), (100, 8)):
        monkeypatch.setattr(machine, "cpu_quota", lambda quota=quota: quota)
        assert machine.default_threads() == expected
