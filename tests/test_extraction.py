# SPDX-License-Identifier: Apache-2.0
"""`dare extract`: PEFT loads what is written, and gets the base plus the truncated delta; budgets hold; bad input is
refused with nothing written. Truths are numpy's own decomposition, in float64."""

import json
import shutil
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import darekit as dk
import families
import tiny
from darekit.extraction import factors
from darekit.extraction.cores import Thin
from darekit.extraction.modules import suffixes

RANK = 5
NAMES = ("m0", "m1")
TABLES = ("embed", "wte", "wpe", "shared")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Class -> a folder with base and m1 of it, in float32, made once."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def of(name, **changes):
        key = name + json.dumps(changes, sort_keys=True)
        if key not in known:
            path = root / str(len(known))
            known[key] = path, tiny.family(path, name, 1, **changes)
        return known[key]

    return of


def best(delta, rank):
    """The closest matrix of a rank, in float64; of experts one by one."""
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def state(model):
    return {name: value.detach().float().numpy() for name, value in model.state_dict().items()}


def merged(cls, base, adapter):
    """What PEFT makes of the two, in float32; nothing that it warns of is about the adapter."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(cls.from_pretrained(base).float(), adapter)
        assert not [one for one in told if "adapter" in str(one.message) or "missing" in str(one.message)]
        return state(model.merge_and_unload())  # may warn that tables are tied no longer


def close(found, wanted, scale):
    return np.linalg.norm(found - wanted) <= 2e-5 * np.linalg.norm(scale) + 1e-7


def check_against_peft(path, cls, rank, **options):
    """Every tensor in memory is the base's, the model's, or the base plus its truncated delta."""
    report = dk.extract(path / "base", path / "m1", path / "lora", rank=rank, overwrite=True, **options)
    before, after = state(cls.from_pretrained(path / "base")), state(cls.from_pretrained(path / "m1"))
    found = merged(cls, path / "base", path / "lora")
    names = {one.module for one in report.modules if one.rank}
    low = 0
    for name, values in found.items():
        delta = after[name] - before[name]
        if name.removesuffix(".weight") in names:
            wanted, low = before[name] + best(delta, rank), low + 1
        elif (values.ndim > 1 and any(word in name for word in TABLES)) or name == "lm_head.weight":
            wanted = before[name]
        else:
            wanted = after[name]
        assert close(values, wanted, delta), name
    assert low == len(names) > 0
    return report


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification"])
def test_peft_merges_it_to_the_base_and_the_truncated_delta(made, name):
    path, cls = made(name)
    report = check_against_peft(path, cls, RANK)
    assert report.rank == RANK and 0 < report.error < 1 and 0 < report.outside < 0.5


def test_a_head_of_two_layers_is_saved_as_peft_looks_for_it(tmp_path, monkeypatch):
    name = "RobertaForSequenceClassification"  # PEFT saves `classifier` of itself, and no layer in it besides
    monkeypatch.setitem(tiny.SIZES, name, {**tiny.ENCODER, "num_labels": 3})
    cls = tiny.family(tmp_path, name, 1)
    check_against_peft(tmp_path, cls, RANK)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "classifier" in config["modules_to_save"]


@pytest.mark.check
@pytest.mark.parametrize(
    "name",
    [
        "BertForMaskedLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM",
        "Qwen3NextForCausalLM", "Llama4ForCausalLM", "GPTNeoXForCausalLM", "T5ForConditionalGeneration",
        "Gemma3nForCausalLM",
    ],
)  # fmt: skip
def test_peft_merges_other_families_alike(made, name):
    path, cls = made(name)
    report = dk.extract(path / "base", path / "m1", path / "lora", rank=RANK, overwrite=True)
    before, after = state(cls.from_pretrained(path / "base")), state(cls.from_pretrained(path / "m1"))
    found = merged(cls, path / "base", path / "lora")
    reported = {one.module: one for one in report.modules}
    for module, one in reported.items():
        name = module if module in found else f"{module}.weight"
        delta = after[name] - before[name]
        assert close(found[name], before[name] + best(delta, RANK), delta), module
        assert one.error == pytest.approx(
            np.linalg.norm(delta - best(delta, RANK)) / np.linalg.norm(delta), rel=1e-3, abs=1e-5
        )
    whole = [one for one in report.tensors if one.saved and not one.why and one.norm]  # buffers stay what they are
    assert whole or name.startswith("T5")
    moved = {name for name in found if not np.array_equal(found[name], before[name])}
    counted = sum(after[name].size for name in moved)
    assert counted >= sum(one.parameters for one in report.modules) + sum(one.parameters for one in whole) * 0.99


def answers(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.arange(1, 13)[None]).logits.float().numpy()


def factored(path, cls, factors, within=1e-6):
    """Extract with these factors -> module -> report, after PEFT's merge, darekit's and the truth were compared.

    PEFT adds the factors of tied tables twice when it merges them, so there its answers before are the truth.
    """
    peft = pytest.importorskip("peft")
    report = dk.extract(path / "base", path / "m1", path / "lora", rank=RANK, factors=factors, overwrite=True)
    before, after = state(cls.from_pretrained(path / "base")), state(cls.from_pretrained(path / "m1"))
    recipe = {"base_model": str(path / "base"), "models": [str(path / "lora")], "merge_method": "task_arithmetic"}
    dk.merge(recipe, path / "out", overwrite=True)
    made = cls.from_pretrained(path / "out")
    ours, reported = state(made), {one.module: one for one in report.modules}
    for module in reported:
        name = module if module in before else f"{module}.weight"
        delta = (after[name] - before[name]).astype(np.float64)
        matrix = delta if "experts" in name else delta.reshape(delta.shape[0], -1)
        wanted = before[name] + best(matrix, RANK).reshape(delta.shape)
        assert np.abs(ours[name] - wanted).max() <= within * np.abs(wanted).max(), name
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(cls.from_pretrained(path / "base").float(), path / "lora")
        assert not [one for one in told if "missing" in str(one.message) or "tying" in str(one.message)]
        if hasattr(made.config, "vocab_size") and "CausalLM" in cls.__name__ + "CausalLM" * ("LMHead" in cls.__name__):
            wanted = answers(model)
            assert np.abs(answers(made) - wanted).max() <= 1e-5 * np.abs(wanted).max()
        if not json.loads((path / "lora" / "adapter_config.json").read_text()).get("ensure_weight_tying"):
            for name, values in state(model.merge_and_unload()).items():
                assert np.abs(ours[name] - values).max() <= within * np.abs(values).max(), name
    return reported


@pytest.mark.parametrize(
    ("name", "changes", "module"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, "model.embed_tokens"),
        ("ViTForImageClassification", {}, "vit.embeddings.patch_embeddings.projection"),
        pytest.param("LlamaForCausalLM", {}, "model.embed_tokens", marks=pytest.mark.check),
        pytest.param("GPT2LMHeadModel", {}, "transformer.wte", marks=pytest.mark.check),
        pytest.param("WhisperForConditionalGeneration", {}, "model.encoder.conv2", marks=pytest.mark.check),
        pytest.param("CLIPModel", {}, "vision_model.embeddings.patch_embedding", marks=pytest.mark.check),
    ],
)
def test_tables_and_convolutions_get_factors_if_asked_for(made, name, changes, module):
    path, cls = made(name, **changes)
    found = factored(path, cls, ["embeddings", "convolutions"])
    assert module in found and found[module].rank == RANK and 0 < found[module].error < 1
    dk.extract(path / "base", path / "m1", path / "lora", rank=RANK, overwrite=True)
    assert module not in (path / "lora" / "adapter_config.json").read_text()


@pytest.mark.check
def test_biases_of_experts_get_factors(made):
    """PEFT takes a parameter of two dimensions for a matrix: nothing else of it could hold them."""
    path, cls = made("GptOssForCausalLM")
    found = factored(path, cls, [])
    biases = [one for name, one in found.items() if name.endswith("_bias")]
    assert len(biases) == 4 and all(one.rank == 4 and one.error < 1e-6 for one in biases)
    report = dk.extract(path / "base", path / "m1", path / "lora", rank=RANK, overwrite=True, save=["norms"])
    (why,) = {one.why for one in report.tensors if one.name.endswith("down_proj_bias")}
    assert why.startswith("not saved unless")


def test_what_can_have_no_factors_is_told(made):
    path, _ = made("BertForMaskedLM")
    report = dk.extract(path / "base", path / "m1", path / "lora", rank=RANK, overwrite=True, factors=["embeddings"])
    (why,) = [one.why for one in report.tensors if one.name.endswith("word_embeddings.weight")]
    assert why.startswith("it is also the head (cls.predictions.decoder), and PEFT ties factors only of embed_tokens")


@pytest.mark.check
def test_convolutions_that_get_factors_are_plain():
    """What the table says of each model type is what transformers' classes are."""
    torch = pytest.importorskip("torch")
    import transformers

    from darekit.extraction.layers import PLAIN_CONVOLUTIONS

    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for model_type, names in PLAIN_CONVOLUTIONS.items():
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type))
        found = [
            (name, module)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in names and getattr(getattr(module, "weight", None), "ndim", 0) > 2
        ]
        found = [(name, one) for name, one in found if "weight" in dict(one.named_parameters(recurse=False))]
        assert {name.rpartition(".")[2] for name, _ in found} == set(names), model_type
        for name, module in found:
            assert type(module) in kinds and module.groups == 1, (model_type, name)


def low_rank(path, rank, scale=0.001):
    """m1 is the base plus a delta of this rank in every matrix of a layer."""
    tensors = load_file(path / "base" / "model.safetensors")
    rng = np.random.default_rng(5)
    for name, value in tensors.items():
        if value.ndim == 2 and "layers" in name:
            delta = rng.normal(size=(value.shape[0], rank)) @ rng.normal(size=(rank, value.shape[1]))
            tensors[name] = value + (scale * delta).astype(np.float32)
    save_file(tensors, path / "m1" / "model.safetensors", metadata={"format": "pt"})


def test_a_delta_of_a_rank_is_recovered(made, tmp_path):
    source, cls = made("LlamaForCausalLM")
    shutil.copytree(source, tmp_path / "f")
    low_rank(tmp_path / "f", 3)
    base, model = tmp_path / "f" / "base", tmp_path / "f" / "m1"
    report = dk.extract(base, model, tmp_path / "lora", rank=8)
    ranks = {one.name: one.rank for one in report.modules}
    assert {rank for name, rank in ranks.items() if "layers" in name} == {3} and ranks["lm_head.weight"] == 0
    before, after, found = (state(cls.from_pretrained(base)), state(cls.from_pretrained(model)),
                            merged(cls, base, tmp_path / "lora"))  # fmt: skip
    for name in before:
        assert np.linalg.norm(found[name] - after[name]) <= 1e-5 * max(
            1e-30, np.linalg.norm(after[name] - before[name])
        )
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and "lm_head" not in config["target_modules"]
    assert config["modules_to_save"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [{"energy": 0.9}, {"error": 0.3}])
def test_budgets_hold_for_every_module(made, tmp_path, dtype, budget):
    path, _ = made("LlamaForCausalLM")
    report = dk.extract(path / "base", path / "m1", tmp_path / "lora", dtype=dtype, **budget)
    before, after = (load_file(path / one / "model.safetensors") for one in ("base", "m1"))
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors") if dtype == "float32" else None
    share = budget.get("energy") or 1 - budget["error"] ** 2
    for one in report.modules:
        delta = (after[one.name] - before[one.name]).astype(np.float64)
        s = np.linalg.svd(delta, compute_uv=False)
        smallest = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), share)) + 1
        assert 1 - one.error**2 >= share - 1e-6
        assert one.rank == smallest or (dtype != "float32" and smallest <= one.rank <= smallest + 2)
        if stored:
            a, b = (stored[f"base_model.model.{one.module}.lora_{x}.weight"] for x in "AB")
            assert np.linalg.norm(delta - b @ a) / np.linalg.norm(delta) == pytest.approx(one.error, rel=1e-4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert all(config["rank_pattern"].get(one.module, config["r"]) == one.rank for one in report.modules)


def test_peft_reads_ranks_of_their_own(made, tmp_path):
    path, cls = made("LlamaForCausalLM")
    report = dk.extract(path / "base", path / "m1", tmp_path / "lora", energy=0.6)
    assert len({one.rank for one in report.modules}) > 2
    before, after = (load_file(path / one / "model.safetensors") for one in ("base", "m1"))
    found = merged(cls, path / "base", tmp_path / "lora")
    for one in report.modules:
        delta = after[one.name] - before[one.name]
        assert close(found[one.name], before[one.name] + best(delta, one.rank), delta)


def test_a_rank_limit_holds_a_budget_back(made, tmp_path, dare):
    path, _ = made("LlamaForCausalLM")
    done = dare("extract", path / "base", path / "m1", tmp_path / "lora", "--error", "0.1", "--max-rank", "6", "--json")
    assert done.data["rank"] == 6 and "lose more than was asked for" in done.err


@pytest.mark.parametrize("options", [{"rank": 4}, {"error": 0.5}, {"rank": 4, "dtype": "bfloat16"}])
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "LlamaForCausalLM"])
def test_threads_change_no_byte(made, tmp_path, options, name):
    wide = {"hidden_size": 160, "intermediate_size": 224} if name.startswith("Llama") else {}  # not LAPACK's alone
    path, _ = made(name, **wide)
    files = []
    for threads in (1, 3):
        dk.extract(path / "base", path / "m1", tmp_path / str(threads), threads=threads, **options)
        files.append((tmp_path / str(threads) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


# --- the decomposition


def spectrum(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in shape)
    return ((u * values) @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(600, 400), (300, 700)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_the_randomised_factors_are_near_the_optimum(shape, decay):
    values = np.arange(1, min(shape) + 1) ** -decay
    matrix = spectrum(shape, values)
    assert not factors.is_whole(shape, 16)
    found = factors.of_rank(matrix, 16, factors.key_of("w"))
    optimum = np.sqrt(np.sum(values[16:] ** 2))
    assert found.rank == 16
    assert optimum * 0.9999 <= np.sqrt(factors.residual(matrix, found)) <= 1.01 * optimum
    again = factors.of_rank(matrix.copy(), 16, factors.key_of("w"))
    assert np.array_equal(found.a, again.a) and np.array_equal(found.b, again.b)
    assert not np.array_equal(found.a, factors.of_rank(matrix, 16, factors.key_of("v")).a)


def test_the_randomised_factors_of_a_low_rank_matrix_are_the_matrix():
    rng = np.random.default_rng(1)
    matrix = (rng.normal(size=(900, 4)) @ rng.normal(size=(4, 500)) * 1e-4).astype(np.float32)
    found = factors.of_rank(matrix, 32, 7)
    assert found.rank == 4 and factors.residual(matrix, found) <= 1e-10 * factors.square(matrix)


def test_signs_are_settled_and_both_factors_are_equally_long():
    matrix = spectrum((80, 60), np.arange(60, 0, -1.0))
    for found in (factors.of_rank(matrix, 8, 1), factors.everything(-matrix)[0].cut(8)):
        at = np.abs(found.b).argmax(0)
        assert (found.b[at, np.arange(8)] > 0).all()
        assert np.allclose(np.linalg.norm(found.b, axis=0), np.linalg.norm(found.a, axis=1), rtol=1e-3)


@pytest.mark.parametrize("matrix", [np.zeros((70, 90)), np.eye(70, 90) * 1e-20, np.ones((1, 1)), np.ones((200, 1))])
def test_odd_matrices(matrix):
    matrix = matrix.astype(np.float32)
    found = factors.of_rank(matrix, 3, 0)
    assert np.isfinite(found.a).all() and np.isfinite(found.b).all() and found.rank <= 3
    assert factors.residual(matrix, found) <= factors.square(matrix)
    assert found.rank == (0 if not matrix.any() else min(3, *matrix.shape))


def _values(kind, count):
    return {"flat": np.linspace(1.5, 0.5, count), "steep": np.arange(1, count + 1) ** -1.5,
            "low": np.where(np.arange(count) < 30, 10.0 ** (-np.arange(count) / 10), 0)}[kind]  # fmt: skip


@pytest.mark.parametrize("shape", [(420, 420), (420, 640), (1000, 400)])
@pytest.mark.parametrize("kind", ["flat", "steep", "low"])
def test_rotated_factors_are_lapacks(shape, kind):
    """Matrices that LAPACK is not asked for: all ranks are the optimum, values are exact, factors orthogonal."""
    values = _values(kind, min(shape))
    matrix = spectrum(shape, values)
    found, known = factors.everything(matrix)
    assert min(shape) > factors.LAPACKS
    assert np.abs(known - values).max() <= 1e-6 * values[0]
    assert found.rank == (30 if kind == "low" else min(shape))
    for rank in (1, 20, found.rank):
        optimum = np.sqrt(np.sum(values[rank:] ** 2))
        lost = np.sqrt(factors.residual(matrix, found.cut(rank)))
        assert abs(lost - optimum) <= 2e-6 * np.linalg.norm(values)
    for one in (found.b.T, found.a):
        unit = one / np.linalg.norm(one, axis=1, keepdims=True)
        large = int(np.count_nonzero(values[: found.rank] > 1e-2 * values[0]))
        assert np.abs(unit[:large] @ unit[:large].T - np.eye(large)).max() < 1e-4
    again, _ = factors.everything(matrix.copy())
    assert np.array_equal(found.a, again.a) and np.array_equal(found.b, again.b)


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [(np.zeros((500, 400)), 0), (np.eye(400), 400), (np.ones((400, 700)), 1), (np.eye(900, 400) * 1e-19, 400),
     (np.eye(400)[::-1] * np.arange(1, 401), 400), (np.eye(400, 800) * (np.arange(400) % 2)[:, None], 200)],
)  # fmt: skip
def test_odd_matrices_that_are_rotated(matrix, rank):
    matrix = matrix.astype(np.float32)
    found, values = factors.everything(matrix)
    assert found.rank == rank and np.count_nonzero(values) <= values.size == 400
    assert factors.residual(matrix, found) <= 1e-10 * factors.square(matrix)


@pytest.mark.parametrize("shape", [(768, 768), (768, 1100), (2048, 600)])
def test_a_whole_decomposition_holds_four_matrices(shape):
    matrix = np.random.default_rng(3).standard_normal(shape, np.float32)
    tracemalloc.start()
    factors.everything(matrix)
    peak = tracemalloc.get_traced_memory()[1] + matrix.nbytes
    tracemalloc.stop()
    assert peak <= 4 * matrix.nbytes and peak <= 1.15 * factors.memory(shape, None)


def test_short_names_hit_nothing_else():
    assert suffixes(["m.0.q", "m.1.q"], ["m.0.q", "m.1.q", "m.0.q.norm"]) == ["q"]
    assert suffixes(["m.0.q", "m.1.q"], ["q.out"]) == ["m.0.q", "m.1.q"]  # a container of that name
    assert suffixes(["m.up.0"], ["layers.0.k"]) == ["m.up.0"]


# --- recipes and packs


def test_a_recipe_is_extracted_before_it_is_rounded(llamas, tmp_path):
    """In one pass: with everything kept, base + B A is the merge in real numbers, not its rounding to BF16."""
    recipe = {"base_model": str(llamas.path / "base"), "merge_method": "task_arithmetic", "dtype": "bfloat16",
              "models": [str(llamas.path / name) for name in NAMES[:2]], "parameters": {"weight": 0.37}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    report = dk.extract(llamas.path / "base", tmp_path / "r.yaml", tmp_path / "lora", energy=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "r.yaml"]
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for one in report.modules:
        base = llamas.base[one.name].astype(np.float64)
        delta = sum(0.37 * (model[one.name].astype(np.float64) - base) for model in llamas.models[:2])
        a, b = (stored[f"base_model.model.{one.module}.lora_{x}.weight"] for x in "AB")
        assert np.linalg.norm(b @ a - delta) <= 1e-5 * np.linalg.norm(delta)
    data = dk.extract(llamas.path / "base", recipe, tmp_path / "data", energy=1)
    assert (tmp_path / "data" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "lora" / "adapter_model.safetensors"
    ).read_bytes()
    assert data.error == report.error


def test_a_pack_gives_the_delta_that_it_unpacks_to(llamas, tmp_path):
    base, model = llamas.path / "base", llamas.path / NAMES[0]
    dk.pack(base, model, tmp_path / "p.safetensors", drop_rate=0.5, seed=1)
    dk.unpack(base, tmp_path / "p.safetensors", tmp_path / "whole")
    said = []
    dk.extract(base, tmp_path / "p.safetensors", tmp_path / "a", rank=4, say=said.append)
    dk.extract(base, tmp_path / "whole", tmp_path / "b", rank=4)
    files = [(tmp_path / one / "adapter_model.safetensors").read_bytes() for one in "ab"]
    assert files[0] == files[1] and any("is a pack" in line for line in said)


# --- what is no matrix


@pytest.mark.parametrize("kinds", [[], ["norms"], ["norms", "embeddings"]])
def test_only_what_is_asked_for_is_saved_whole(made, tmp_path, kinds):
    path, _ = made("LlamaForCausalLM")
    report = dk.extract(path / "base", path / "m1", tmp_path / "lora", rank=4, save=kinds)
    assert {one.kind for one in report.tensors if one.saved} == set(kinds)
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert any("layernorm" in key for key in keys) == ("norms" in kinds)
    assert any("embed" in key for key in keys) == ("embeddings" in kinds)
    left = [one for one in report.tensors if not one.saved]
    total = report.outside
    after, before = (load_file(path / one / "model.safetensors") for one in ("m1", "base"))
    squares = {name: float(np.sum((after[name].astype(np.float64) - before[name]) ** 2)) for name in after}
    assert total == pytest.approx(sum(squares[one.name] for one in left) / sum(squares.values()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "tables"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, ("model.embed_tokens.weight", "lm_head.weight")),
        ("GPT2LMHeadModel", {}, ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")),
        ("BertForMaskedLM", {}, ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
                                 "cls.predictions.decoder.bias")),
    ],
)  # fmt: skip
def test_a_table_is_saved_for_all_that_share_it(made, tmp_path, name, changes, tables):
    path, cls = made(name, **changes)
    report = dk.extract(path / "base", path / "m1", tmp_path / "lora", rank=4, save=["embeddings", "biases"])
    after, found = state(cls.from_pretrained(path / "m1")), merged(cls, path / "base", tmp_path / "lora")
    for table in tables:
        assert np.array_equal(found[table], after[table]), table
    names = [one.name for one in report.tensors]
    assert len(names) == len(set(names))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["ensure_weight_tying"] is True


def test_a_new_head_is_saved_with_the_adapter(made, tmp_path):
    """A base without a classifier: the adapter brings it, for the class that has it."""
    source, cls = made("BertForSequenceClassification")
    shutil.copytree(source, tmp_path / "f")
    base = tmp_path / "f" / "base"
    tensors = load_file(base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("classifier")}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    report = dk.extract(base, tmp_path / "f" / "m1", tmp_path / "lora", rank=4)
    head = [one for one in report.tensors if one.kind == "heads"]
    assert [one.saved for one in head] == [True, True] and head[0].norm is None
    after, found = state(cls.from_pretrained(tmp_path / "f" / "m1")), merged(cls, base, tmp_path / "lora")
    assert np.array_equal(found["classifier.weight"], after["classifier.weight"])


def test_a_head_that_is_not_saved_is_not_expected_by_peft(made, tmp_path):
    path, cls = made("BertForSequenceClassification")
    dk.extract(path / "base", path / "m1", tmp_path / "lora", rank=4, save=[])
    found, before = merged(cls, path / "base", tmp_path / "lora"), state(cls.from_pretrained(path / "base"))
    assert np.array_equal(found["classifier.weight"], before["classifier.weight"])


def test_vocabularies_that_differ(llamas, tmp_path, dare):
    wide = {name: np.concatenate([value, value[:4]]) if value.shape[:1] == (families.VOCAB,) else value
            for name, value in llamas.models[0].items()}  # fmt: skip
    model = families.save(tmp_path / "wide", wide, families.config(vocab=families.VOCAB + 4))
    base = llamas.path / "base"
    refused = dare("extract", base, model, tmp_path / "lora", "--rank", "4")
    assert refused.code == 1 and "--vocab" in refused.err and not (tmp_path / "lora").exists()
    assert dare("extract", base, model, tmp_path / "lora", "--rank", "4", "--vocab", "base").code == 0
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert stored["base_model.model.lm_head.lora_B.weight"].shape == (families.VOCAB, 4)


# --- vLLM


def test_for_vllm_only_factors_of_layers_are_written(made, tmp_path):
    path, _ = made("LlamaForCausalLM")
    report = dk.extract(path / "base", path / "m1", tmp_path / "lora", rank=4, server="vllm")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none" and "lm_head" not in config["target_modules"]
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) and ".layers." in key for key in keys)
    assert any("--max-lora-rank 8" in note for note in report.notes)


def test_for_vllm_experts_have_factors_of_their_own_under_stored_names(made, tmp_path):
    path, _ = made("MixtralForCausalLM")
    dk.extract(path / "base", path / "m1", tmp_path / "lora", rank=4, server="vllm")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    before, after = (load_file(path / one / "model.safetensors") for one in ("base", "m1"))
    name = next(name for name in before if "experts.2." in name)
    a, b = (stored[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
    delta = after[name] - before[name]
    assert close(b @ a, best(delta, 4), delta)
    assert "target_parameters" not in json.loads((tmp_path / "lora" / "adapter_config.json").read_text())


# --- what goes wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "one of --rank, --energy and --error"),
        (["--rank", "0"], "greater than or equal to 1"),
        (["--rank", "4", "--energy", "0.5"], "one of --rank"),
        (["--energy", "95"], "write 0.95 for 95 %"),
        (["--error", "1"], "outside [0, 1)"),
        (["--rank", "4", "--dtype", "int8"], "int8"),
        (["--rank", "4", "--for", "tgi"], "vllm"),
        (["--rank", "4", "--out-kind", "mlx"], "peft"),
    ],
)
def test_usage_errors(dare, llamas, tmp_path, options, words):
    done = dare("extract", llamas.path / "base", llamas.path / NAMES[0], tmp_path / "out", *options)
    assert done.code == 2 and words in " ".join(done.err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "4", "--save", "norm"], "expected some of norms"),
        (["--rank", "4", "--for", "vllm", "--save", "norms"], "vLLM refuses"),
        (["--rank", "1024", "--for", "vllm"], "up to 512"),
        (["--rank", "4", "--max-rank", "8"], "nothing to limit"),
    ],
)
def test_terms_that_contradict_each_other(dare, llamas, tmp_path, options, words):
    done = dare("extract", llamas.path / "base", llamas.path / NAMES[0], tmp_path / "out", *options)
    assert done.code == 1 and words in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_its_base_has_nothing_to_extract(dare, llamas, tmp_path):
    done = dare("extract", llamas.path / "base", llamas.path / "base", tmp_path / "out", "--rank", "4")
    assert done.code == 1 and "nothing to extract" in done.err and not list(tmp_path.iterdir())


def test_only_norms_that_differ_are_no_adapter(dare, llamas, tmp_path):
    tensors = {name: value + value.dtype.type(0.01) if value.ndim == 1 else value
               for name, value in llamas.base.items()}  # fmt: skip
    model = families.save(tmp_path / "m", tensors, families.config())
    done = dare("extract", llamas.path / "base", model, tmp_path / "out", "--rank", "4")
    assert done.code == 1 and "not matrices differ" in " ".join(done.err.split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_told_by_name(dare, llamas, tmp_path, bad):
    tensors = {name: value.copy() for name, value in llamas.models[0].items()}
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name].reshape(-1)[-1] = bad
    model = families.save(tmp_path / "m", tensors, families.config())
    done = dare("extract", llamas.path / "base", model, tmp_path / "out", "--rank", "4")
    assert done.code == 1 and name in done.err and "NaN or Inf" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_another_models_base_is_refused(dare, llamas, tmp_path):
    rng = np.random.default_rng(9)
    other = families.save(tmp_path / "other", families.llama(rng), families.config())
    done = dare("extract", other, llamas.path / NAMES[0], tmp_path / "out", "--rank", "4")
    assert done.code == 1 and "does not look like the base" in done.err and not (tmp_path / "out").exists()
    assert dare("extract", other, llamas.path / NAMES[0], tmp_path / "out", "--rank", "4", "--force").code == 0


def test_models_that_are_no_relatives(dare, llamas, made, tmp_path):
    path, _ = made("GPT2LMHeadModel")
    done = dare("extract", llamas.path / "base", path / "m1", tmp_path / "out", "--rank", "4")
    assert done.code == 1 and "do not have the same tensors" in done.err and not list(tmp_path.iterdir())


def test_out_is_replaced_only_on_request(dare, llamas, tmp_path):
    base, model, out = llamas.path / "base", llamas.path / NAMES[0], tmp_path / "out"
    assert dare("extract", base, model, out, "--rank", "4").code == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    again = dare("extract", base, model, out, "--rank", "2")
    assert again.code == 1 and "--overwrite" in again.err
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert dare("extract", base, model, out, "--rank", "2", "--overwrite").code == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_input_is_never_replaced(dare, llamas, tmp_path):
    families.copy(llamas.path / NAMES[0], tmp_path / "m")
    done = dare("extract", llamas.path / "base", tmp_path / "m", tmp_path / "m", "--rank", "4", "--overwrite")
    assert done.code == 1 and (tmp_path / "m" / "model.safetensors").exists()
    assert not (tmp_path / "m" / "adapter_config.json").exists()


@pytest.mark.parametrize("base", ["adapter", "recipe.yaml", "nowhere"])
def test_a_base_must_be_a_checkpoint(dare, llamas, tmp_path, base):
    dk.extract(llamas.path / "base", llamas.path / NAMES[0], tmp_path / "adapter", rank=2)
    (tmp_path / "recipe.yaml").write_text(json.dumps(families.recipe(llamas.path)))
    done = dare("extract", tmp_path / base, llamas.path / NAMES[0], tmp_path / "out", "--rank", "4")
    assert done.code == 1 and done.err.startswith("dare: ") and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_run_that_dies_leaves_nothing_that_looks_finished(llamas, tmp_path, monkeypatch):
    from darekit.extraction import adapters

    def torn(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "write", torn)
    with pytest.raises(dk.DarekitError, match="No space left"):
        dk.extract(llamas.path / "base", llamas.path / NAMES[0], tmp_path / "out", rank=4)
    assert not list(tmp_path.iterdir())


# --- what is shown


def test_a_dry_run_tells_ranks_sizes_and_memory(dare, llamas, tmp_path):
    arguments = ("extract", llamas.path / "base", llamas.path / NAMES[0], tmp_path / "out", "--rank", "4")
    done = dare(*arguments, "--dry-run")
    assert done.code == 0 and "Would write" in done.out and "memory" in done.out and "self_attn.q_proj" in done.out
    plan = dare(*arguments, "--dry-run", "--json").data
    assert not list(tmp_path.iterdir())
    report = dare(*arguments, "--json").data
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert 0 < size - plan["bytes_at_most"] < 10_000  # the header
    assert report["bytes"] == size and report["rank"] == 4
    assert [one["module"] for one in report["modules"]] == [one["module"] for one in plan["modules"]]


def test_the_report_says_how_much_of_the_delta_it_carries(dare, llamas, tmp_path):
    done = dare("extract", llamas.path / "base", llamas.path / NAMES[0], tmp_path / "out", "--rank", "4")
    assert "of the delta" in done.out and "embeddings (1)" in done.out and "times smaller" in done.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rank 4" in card and str(llamas.path) not in card


def test_reports_are_short_in_a_console(llamas, tmp_path):
    report = dk.extract(llamas.path / "base", llamas.path / NAMES[0], tmp_path / "out", rank=4)
    assert repr(report).startswith("<ExtractReport: ") and len(repr(report)) < 300
    assert json.loads(json.dumps(report.to_data()))["energy"] == pytest.approx(1 - report.error**2)
    assert isinstance(Path(report.output), Path)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "BertForSequenceClassification", "MixtralForCausalLM", "GptOssForCausalLM"]
)
def test_darekit_reads_what_it_writes_as_peft_does(made, tmp_path, name):
    path, cls = made(name)
    dk.extract(path / "base", path / "m1", tmp_path / "lora", rank=3, save=["norms", "biases", "heads", "routers"])
    wanted = merged(cls, path / "base", tmp_path / "lora")
    data = {"merge_method": "linear", "models": [f"{path / 'base'}+{tmp_path / 'lora'}"]}
    dk.merge(data, tmp_path / "whole")
    found = state(cls.from_pretrained(tmp_path / "whole"))
    for name in wanted:
        assert np.abs(found[name] - wanted[name]).max() <= 1e-6 * max(1e-6, np.abs(wanted[name]).max()), name


def test_experts_of_one_parameter_share_a_rank_and_each_keeps_its_budget(made, tmp_path):
    path, cls = made("MixtralForCausalLM")
    report = dk.extract(path / "base", path / "m1", tmp_path / "lora", energy=0.6)
    before, after = state(cls.from_pretrained(path / "base")), state(cls.from_pretrained(path / "m1"))
    found = merged(cls, path / "base", tmp_path / "lora")
    experts = [one for one in report.modules if "experts" in one.module]
    assert len(experts) == 4 and len({one.rank for one in report.modules}) > 1
    for one in experts:
        for e in range(4):
            delta = (after[one.module][e] - before[one.module][e]).astype(np.float64)
            lost = np.linalg.norm(delta - (found[one.module][e] - before[one.module][e])) ** 2
            assert 0.01 < lost / np.linalg.norm(delta) ** 2 <= 0.4 + 1e-5


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_thin_products_are_decomposed_as_whole_ones_are(rows, columns, inner, seed):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(rows, inner)), rng.normal(size=(inner, columns))
    thin, whole = Thin(left, right), left @ right
    found, values = thin.decomposed()
    truth = np.linalg.svd(whole, compute_uv=False)
    assert np.allclose(values[: truth.size], truth[: values.size], atol=1e-9)
    assert np.allclose(found.b @ found.a, whole, atol=1e-5) and found.rank <= min(rows, columns, inner)
    assert thin.square() == pytest.approx(np.sum(whole**2), abs=1e-9)
    cut = found.cut(1)
    lost, total = np.sum((whole - cut.b @ cut.a) ** 2), np.sum(whole**2)  # a difference of sums as large as the second
    assert thin.residual(cut) == pytest.approx(lost, rel=1e-6, abs=1e-8 * (1 + total))
    turned, _ = thin.turned.decomposed()
    assert np.allclose(turned.b @ turned.a, whole.T, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_factors_of_any_shape(rows, columns, rank, seed):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    found = factors.of_rank(matrix, rank, seed)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert found.rank == min(rank, rows, columns)
    lost = factors.residual(matrix, found)
    assert lost == pytest.approx(np.sum(s[found.rank :] ** 2), rel=1e-4, abs=1e-5)
