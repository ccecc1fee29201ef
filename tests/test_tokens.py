# SPDX-License-Identifier: Apache-2.0
"""Merges whose rows are matched by token: which tokens there are, where rows come from, and what their masks are."""

import json
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.checkpoints import open_checkpoint, sample_digest
from darekit.checkpoints.tokenizers import AddedToken
from darekit.errors import HomologyError, PlanError
from darekit.inputs.statistics import FORMAT, write_statistics
from darekit.masks import kept, stream_of
from darekit.tokens.joining import Part, join
from families import HIDDEN

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = ("<unk>", "<s>", "</s>")


def token(content, at, special=True, **flags):
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": at, "content": content, **usual, "special": special, **flags}


def put_tokenizer(directory, words, added=(), **config):
    """Special tokens, words and added tokens, by id; an added token may be (text, flags)."""
    vocabulary = {word: at for at, word in enumerate((*SPECIAL, *words))}
    entries = [token(word, at) for at, word in enumerate(SPECIAL)]
    for entry in added:
        content, flags = (entry, {}) if isinstance(entry, str) else entry
        at = vocabulary.get(content, len(vocabulary) + sum(e["id"] >= len(vocabulary) for e in entries))
        entries.append(token(content, at, **flags))
    document = {
        "version": "1.0", "added_tokens": entries, "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(document))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


WORDS = tuple("abcdefgh")


def model(directory, rng, words=WORDS, added=(), *, rows=None, kind=np.float32, tied=False, like=None, **config):
    """A tiny Llama and its tokenizer; `like`: tensors that it is a little different from, as far as shapes agree."""
    rows = rows or len(SPECIAL) + len(words) + len([a for a in added if a not in words])
    tensors = families.llama(rng, kind, vocab=rows, tied=tied, layers=1)
    if like is not None:
        for name, array in tensors.items():
            old = like[name]
            common = tuple(slice(min(a, b)) for a, b in zip(array.shape, old.shape, strict=True))
            noise = rng.normal(0, 2e-3, old[common].shape)
            array[common] = (old[common].astype(np.float64) + noise).astype(kind)
    dtype = {np.float32: "float32", np.float64: "float64"}.get(kind, "bfloat16")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    families.save(directory, tensors, families.config(vocab=rows, tied=tied, layers=1, dtype=dtype) | ids)
    put_tokenizer(directory, words, added, **config)
    return tensors


def merged(path, **keys):
    """Models m0, m1, ... on base, where there is one, merged -> (tensors, tokens by id, config, lock)."""
    models = sorted(p.name for p in path.iterdir() if p.name[0] == "m" and p.is_dir())
    recipe = {"models": [{"model": str(path / name)} for name in models], "merge_method": "linear"}
    if (path / "base").exists():
        recipe["base_model"] = str(path / "base")
    out = path / "out"
    dk.merge(recipe | keys, out, overwrite=True)
    document = json.loads((out / "tokenizer.json").read_text())
    ids = dict(document["model"]["vocab"]) | {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    config = json.loads((out / "config.json").read_text())
    return families.load(out), sorted(ids, key=ids.get), config, json.loads((out / "darekit.lock.json").read_text())


@pytest.fixture
def three(tmp_path):
    """base; m0 with <x>; m1 with <y> and <x>: .path and their tensors."""
    rng = np.random.default_rng(0)
    base = model(tmp_path / "base", rng)
    m0 = model(tmp_path / "m0", rng, added=["<x>"], like=base)
    m1 = model(tmp_path / "m1", rng, added=["<y>", "<x>"], like=base)
    return tmp_path, base, m0, m1


# --- which tokens


def part(tokens, added=(), rows=99):
    entries = tuple(AddedToken(content, at, frozenset(flags)) for content, at, flags in added)
    vocabulary = {content: at for at, content in enumerate(tokens)} | {entry.content: entry.id for entry in entries}
    return Part(type("T", (), {"vocabulary": vocabulary, "added": entries}), rows)


def test_a_union_appends_model_by_model_and_id_by_id():
    base = part("abc", [("<s>", 3, ["special"])])
    one = part("abzy", [("<t>", 5, ["special"]), ("<r>", 4, [])])
    two = part("abcy", [("<q>", 9, []), ("<r>", 4, ["special"])])
    joined = join([base, one, two], 0, union=True, named=["new", "a"])
    assert list(joined.ids.items()) == [
        ("a", 0), ("b", 1), ("c", 2), ("<s>", 3), ("z", 4), ("y", 5), ("<r>", 6), ("<t>", 7), ("<q>", 8), ("new", 9),
    ]  # fmt: skip
    assert [(e.token.content, e.part, e.ordinary) for e in joined.new] == [
        ("z", 1, True), ("y", 1, True), ("<r>", 1, False), ("<t>", 1, False), ("<q>", 2, False), ("new", None, False),
    ]  # fmt: skip
    assert joined.conflicts == (("<r>", 2),) and joined.size == 10 and joined.changed


def test_a_token_without_a_row_is_none():
    base, one = part("abcd", [("<s>", 4, [])], rows=4), part("abcd", [("<s>", 4, ["special"])])
    joined = join([base, one], 0, union=True)
    assert joined.removed == ("<s>",) and joined.ids["<s>"] == 4 and joined.new[0].part == 1
    assert joined.new[0].token.flags == {"special"}
    alone = join([base, one], 0, union=False)
    assert alone.size == 4 and not alone.changed  # its files are left as they are


def test_a_word_that_another_model_protects_becomes_an_added_token():
    joined = join([part("ab"), part("ab", [("b", 1, ["special"])])], 0, union=True)
    assert joined.marked == (AddedToken("b", 1, frozenset({"special"})),) and not joined.new and joined.changed


# --- rows


def test_union_rows(three):
    path, base, m0, m1 = three
    found, tokens, config, lock = merged(path, tokenizer_source="union", merge_method="task_arithmetic")
    assert tokens == [*SPECIAL, *WORDS, "<x>", "<y>"] and config["vocab_size"] == 13
    for name in (EMBED, HEAD):
        # <x>: m0 and m1 have it and the base does not: it gets the mean, they keep theirs. <y>: m1's alone, for all.
        mean = (m0[name][11].astype(np.float64) + m1[name][12]) / 2
        views = [
            np.vstack([base[name], mean, m1[name][11]]), np.vstack([m0[name], m1[name][11]]),
            np.vstack([m1[name][:11], m1[name][12], m1[name][11]]),
        ]  # fmt: skip
        b, one, two = (view.astype(np.float32) for view in views)
        np.testing.assert_allclose(found[name], b + (one - b) + (two - b), rtol=0, atol=1e-7)
        np.testing.assert_array_equal(found[name][12], m1[name][11])  # the donor's row to the bit
    moved = {entry["id"]: entry for entry in lock["tokenizer"]["moved"]}
    ref = {name: str(path / name) for name in ("base", "m0", "m1")}
    assert moved == {
        11: {"id": 11, "token": "<x>", "rows": {ref["base"]: f"mean of {ref['m0']} 11, {ref['m1']} 12"}},
        12: {"id": 12, "token": "<y>", "rows": {ref["base"]: f"{ref['m1']} 11", ref["m0"]: f"{ref['m1']} 11"}},
    }
    assert lock["tokenizer"]["rows"] == 13 and lock["tokenizer"]["tensors"] == [HEAD, EMBED]


def test_the_bases_tokens(three):
    path, _, m0, m1 = three
    found, tokens, config, _ = merged(path, tokenizer_source="base")
    assert tokens == [*SPECIAL, *WORDS] and config["vocab_size"] == 11
    np.testing.assert_allclose(found[EMBED], (m0[EMBED][:11] + m1[EMBED][:11]) / 2, rtol=0, atol=1e-7)
    assert (path / "out" / "tokenizer.json").read_bytes() == (path / "base" / "tokenizer.json").read_bytes()


def test_a_models_tokens(three):
    """m1's ids: <y> 11, <x> 12. The base has neither row: <y> is m1's own, <x> the mean."""
    path, _, m0, m1 = three
    found, tokens, config, _ = merged(path, tokenizer_source=str(path / "m1"))
    assert tokens == [*SPECIAL, *WORDS, "<y>", "<x>"] and config["vocab_size"] == 13
    x = (m0[EMBED][11] + m1[EMBED][12]) / 2
    np.testing.assert_allclose(found[EMBED][11:], [m1[EMBED][11], x], rtol=0, atol=1e-7)


def test_ids_of_special_tokens_are_the_owners(three):
    path, *_ = three
    for name, ids in (("base", 2), ("m0", 2), ("m1", [2, 11])):
        config = json.loads((path / name / "config.json").read_text())
        (path / name / "config.json").write_text(json.dumps(config | {"eos_token_id": ids, "pad_token_id": 0}))
        (path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    for source, ids in (("union", 2), ("base", 2), (str(path / "m1"), [2, 11])):
        _, _, config, _ = merged(path, tokenizer_source=source)
        generation = json.loads((path / "out" / "generation_config.json").read_text())
        assert config["eos_token_id"] == generation["eos_token_id"] == ids and config["pad_token_id"] == 0


def test_without_a_base_the_first_model_comes_first(tmp_path):
    rng = np.random.default_rng(1)
    m0 = model(tmp_path / "m0", rng, added=["<x>"])
    m1 = model(tmp_path / "m1", rng, added=["<y>"], like=m0)
    m2 = model(tmp_path / "m2", rng, added=["<y>"], like=m0)
    found, tokens, _, _ = merged(tmp_path, tokenizer={})
    assert tokens[-2:] == ["<x>", "<y>"]
    y = (m1[EMBED][11].astype(np.float64) + m2[EMBED][11]) / 2
    np.testing.assert_allclose(found[EMBED][11], m0[EMBED][11], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found[EMBED][12], (y + m1[EMBED][11] + m2[EMBED][11]) / 3, rtol=0, atol=1e-7)


def test_named_rows(three):
    path, base, m0, m1 = three
    rows = {
        "<x>": {"source": str(path / "m0"), "force": True},
        "<y>": {"source": {"kind": "zero"}},
        "<z>": {"source": {"kind": "model_token", "model": "base", "token": "a"}},
        "b": {"source": {"kind": "model_token", "model": str(path / "m1"), "token_id": 4}, "force": True},
        "<w>": {},
    }
    found, tokens, _, lock = merged(path, tokenizer={"source": "union", "tokens": rows})
    assert tokens[11:] == ["<x>", "<y>", "<z>", "<w>"]
    np.testing.assert_allclose(found[EMBED][11], m0[EMBED][11], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found[EMBED][12], (0 + m1[EMBED][11]) / 2, rtol=0, atol=1e-7)
    np.testing.assert_allclose(found[EMBED][13], base[EMBED][3], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found[EMBED][4], m1[EMBED][4], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(found[EMBED][14], np.zeros(HIDDEN))
    moved = {entry["token"]: entry["rows"] for entry in lock["tokenizer"]["moved"]}
    assert moved["<w>"] == dict.fromkeys([str(path / name) for name in ("base", "m0", "m1")], "zeros")


def test_rows_of_a_model_that_is_not_merged(three):
    path, base, _, _ = three
    giver = model(path / "giver", np.random.default_rng(5), added=["<v>"], like=base)
    rows = {"<v>": {"source": str(path / "giver")}}
    found, tokens, _, _ = merged(path, tokenizer={"source": "base", "tokens": rows})
    assert tokens[11:] == ["<v>"]
    np.testing.assert_allclose(found[EMBED][11], giver[EMBED][11], rtol=0, atol=1e-7)
    found, tokens, _, _ = merged(path, tokenizer_source=str(path / "giver"))
    assert tokens[11:] == ["<v>"] and not found[EMBED][11].any()  # its tokens, and no row of it


def test_padding(tmp_path):
    """Rows without a token stay; `pad_to_multiple_of` adds the mean of each model's rows."""
    rng = np.random.default_rng(2)
    base = model(tmp_path / "base", rng, rows=16)
    m0 = model(tmp_path / "m0", rng, added=["<x>"], rows=12, like=base)
    found, tokens, config, _ = merged(tmp_path, tokenizer_source="union")
    assert tokens[11:] == ["<x>"] and config["vocab_size"] == 16
    np.testing.assert_allclose(found[EMBED][:12], m0[EMBED], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(found[EMBED][12:], base[EMBED][12:])
    found, _, config, _ = merged(tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 10})
    assert config["vocab_size"] == 20
    np.testing.assert_array_equal(found[EMBED][12:16], base[EMBED][12:])
    np.testing.assert_allclose(found[EMBED][16], m0[EMBED].astype(np.float64).mean(axis=0), rtol=0, atol=1e-7)


def test_nothing_moves_where_tokens_agree(tmp_path):
    """The same bytes and the same files as without a word about tokens."""
    rng = np.random.default_rng(3)
    base = model(tmp_path / "base", rng, kind=ml_dtypes.bfloat16, rows=16)
    model(tmp_path / "m0", rng, kind=ml_dtypes.bfloat16, rows=16, like=base)
    dare = {"sparsify": {"method": "dare", "drop_rate": 0.5}, "merge_method": "task_arithmetic"}
    plain, *_ = merged(tmp_path, **dare)
    for source in ("base", "union", str(tmp_path / "m0")):
        found, _, config, lock = merged(tmp_path, tokenizer_source=source, **dare)
        families.same(found, plain)
        assert config["vocab_size"] == 16 and "moved" not in lock["tokenizer"]
        assert None not in [entry["content_digest"] for entry in lock["inputs"]]


def test_tied_and_untied_heads(tmp_path):
    rng = np.random.default_rng(4)
    base = model(tmp_path / "base", rng, tied=True)
    m0 = model(tmp_path / "m0", rng, added=["<x>"], like=base | {HEAD: base[EMBED]})
    found, _, config, _ = merged(tmp_path, tokenizer_source="union", merge_method="task_arithmetic")
    assert config["tie_word_embeddings"] is False
    np.testing.assert_allclose(found[HEAD], m0[HEAD], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found[EMBED], m0[EMBED], rtol=0, atol=1e-7)


def test_biases_on_the_second_axis(tmp_path):
    """BART's final_logits_bias is (1, tokens)."""
    rng = np.random.default_rng(5)
    arrays = {}
    for name, extra in (("base", []), ("m0", ["<y>"]), ("m1", ["<x>", "<y>"])):
        n = 11 + len(extra)
        arrays[name] = {
            "model.shared.weight": 1 + rng.normal(0, 0.05, size=(n, 4)).astype(np.float32),
            "final_logits_bias": 1 + rng.normal(0, 0.05, size=(1, n)).astype(np.float32),
        }
        config = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart", "vocab_size": n}
        families.save(tmp_path / name, arrays[name], config)
        put_tokenizer(tmp_path / name, WORDS, extra)
    found, tokens, config, _ = merged(tmp_path, tokenizer_source=str(tmp_path / "m1"))
    assert tokens[11:] == ["<x>", "<y>"] and config["vocab_size"] == 13
    one, two = arrays["m0"]["final_logits_bias"], arrays["m1"]["final_logits_bias"]
    x, y = two[0, 11], (one[0, 11] + two[0, 12]) / 2
    expected = [*((one[0, :11] + two[0, :11]) / 2), x, y]
    np.testing.assert_allclose(found["final_logits_bias"], [expected], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found["model.shared.weight"][11], arrays["m1"]["model.shared.weight"][11], atol=1e-7)


# --- masks


@pytest.mark.parametrize("kind", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tile", [None, 100])
def test_masks_follow_the_models_own_rows(tmp_path, kind, tile):
    """m0 has the words in another order: each row is dropped as in its own tensor, whatever its new number."""
    rng = np.random.default_rng(6)
    base = model(tmp_path / "base", rng, kind=kind)
    m0 = model(tmp_path / "m0", rng, words=WORDS[::-1], added=["<x>"], kind=kind, like=base)
    for name in (EMBED, HEAD):  # the same words mean about the same
        order = [0, 1, 2, *range(10, 2, -1)]
        m0[name][:11] = (base[name][order].astype(np.float64) + rng.normal(0, 2e-3, (11, HIDDEN))).astype(kind)
    families.save(tmp_path / "m0", m0)
    recipe = {
        "base_model": str(tmp_path / "base"), "merge_method": "task_arithmetic", "tokenizer_source": "union",
        "models": [{"model": str(tmp_path / "m0"), "parameters": {"seed": 7}}],
        "sparsify": {"method": "drop_only", "drop_rate": 0.5},
    }  # fmt: skip
    dk.merge(recipe, tmp_path / "out", tile=tile)
    found = families.load(tmp_path / "out")
    wide = np.float64 if kind == np.float64 else np.float32
    for name in (EMBED, HEAD):
        mask = kept(7, stream_of(name), 0, 12 * HIDDEN, 0.5).reshape(12, HIDDEN)
        rows = [0, 1, 2, *range(10, 2, -1)]  # of each row of the output the one of m0
        delta = m0[name][rows].astype(wide) - base[name].astype(wide)
        expected = base[name].astype(wide) + delta * mask[rows]
        np.testing.assert_array_equal(found[name][:11], expected.astype(kind))
        np.testing.assert_array_equal(found[name][11], m0[name][11])  # the base has the same row: no delta


def test_rows_that_stay_keep_the_fast_lane(tmp_path):
    """BF16 in tiles of whole blocks: the fast lane takes what is where it was, the general way the rest."""
    rng = np.random.default_rng(11)
    words = [f"w{i}" for i in range(300)]
    base = model(tmp_path / "base", rng, words=words, kind=ml_dtypes.bfloat16)
    m0 = model(tmp_path / "m0", rng, words=words, added=["<x>"], kind=ml_dtypes.bfloat16, like=base)
    m1 = model(tmp_path / "m1", rng, words=words, added=["<y>"], kind=ml_dtypes.bfloat16, like=base)
    recipe = {
        "base_model": str(tmp_path / "base"), "merge_method": "task_arithmetic", "tokenizer_source": "union",
        "models": [{"model": str(tmp_path / f"m{i}"), "parameters": {"seed": i}} for i in range(2)],
        "sparsify": {"method": "drop_only", "drop_rate": 0.5},
    }  # fmt: skip
    outs = []
    for tile in (1024, 1000, None):
        dk.merge(recipe, tmp_path / "out", tile=tile, overwrite=True)
        outs.append(families.load(tmp_path / "out"))
    families.same(outs[0], outs[1])
    families.same(outs[0], outs[2])
    with dk.plan(recipe) as plan:  # no tile needs the general way: where a row moved, the base has the same
        moved = [spec.places for step in plan.steps for chain in step.chains for spec in chain if spec.places]
        assert len(moved) == 4 and all(places.stay(0, 305 * HIDDEN) for places in moved)
    for name in (EMBED, HEAD):
        wide = base[name].astype(np.float32)
        change = np.zeros_like(wide)
        for seed, tensors in ((0, m0), (1, m1)):
            mask = kept(seed, stream_of(name), 0, wide.size, 0.5).reshape(wide.shape)
            change += (tensors[name][:303].astype(np.float32) - wide) * mask
        expected = (wide + change).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(outs[0][name][:303], expected)
        np.testing.assert_array_equal(outs[0][name][303:], [m0[name][303], m1[name][303]])


def test_della_and_magnitude_run_on_moved_rows(tmp_path):
    rng = np.random.default_rng(7)
    base = model(tmp_path / "base", rng)
    m0 = model(tmp_path / "m0", rng, added=["<x>"], like=base)
    for method, more in (("della", {"window": 0.1}), ("magnitude", {})):
        sparsify = {"method": method, "drop_rate": 0.5, "rescale": "none", **more}
        found, *_ = merged(tmp_path, tokenizer_source="union", merge_method="task_arithmetic", sparsify=sparsify)
        delta = found[EMBED][:11] - base[EMBED]
        assert 0.3 < np.mean(delta != 0) < 0.7
        np.testing.assert_array_equal(found[EMBED][11], m0[EMBED][11])


# --- what is said, and what is refused


def notes(path, **keys):
    recipe = {"models": [str(path / "m0")], "base_model": str(path / "base"), "merge_method": "linear", **keys}
    with dk.plan(recipe) as plan:
        return plan.notes


def test_ordinary_tokens_are_told_loudly(tmp_path):
    rng = np.random.default_rng(8)
    base = model(tmp_path / "base", rng)
    model(tmp_path / "m0", rng, words=(*WORDS, "new"), added=[("<x>", {"lstrip": True})], like=base)
    said = notes(tmp_path, tokenizer_source="union")
    assert any(note.startswith("WARNING: ") and "brings 1 ordinary tokens (new)" in note for note in said)
    assert any("tokens added from " in note and note.endswith(": <x>") for note in said)
    merged(tmp_path, tokenizer_source="union")
    document = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert document["added_tokens"][-2:] == [token("new", 11, special=False), token("<x>", 12, lstrip=True)]


def test_tokens_that_nobody_has_are_told(three):
    path, *_ = three
    rows = {"<new>": {}}
    said = notes(path, tokenizer={"source": "base", "tokens": rows})
    assert any(note.startswith("WARNING: no model has rows for <new>: they are zeros") for note in said)


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(three):
    path, *_ = three
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "m0" / name).unlink()
    said = notes(path, tokenizer_source="base")
    assert any("has no tokenizer: its tokens are assumed to be those of" in note for note in said)


def test_refusals(three):
    path, *_ = three
    row = {"source": {"kind": "model_token", "model": str(path / "m0"), "token": "nothing"}}
    with pytest.raises(PlanError, match="its tokenizer has no token 'nothing'"):
        notes(path, tokenizer={"tokens": {"<n>": row}})
    row = {"source": {"kind": "model_token", "model": str(path / "m0"), "token_id": 99}}
    with pytest.raises(PlanError, match=r"is to give its row 99 to '<n>', but .* has 12 rows there"):
        notes(path, tokenizer={"tokens": {"<n>": row}})
    (path / "m0" / "tokenizer.json").write_text("{")
    with pytest.raises(PlanError, match=r"the tokenizer of .*m0.* cannot be read"):
        notes(path, tokenizer={})


def test_no_tokenizer_at_all(llamas):
    recipe = families.recipe(llamas.path, k=1, tokenizer_source="union")
    with pytest.raises(PlanError, match=r"no tokenizer beside .*base.*: remove tokenizer_source"):
        dk.plan(recipe)


def test_tensors_that_count_tokens_differently_cannot_be_moved(tmp_path):
    rng = np.random.default_rng(9)
    base = model(tmp_path / "base", rng)
    m0 = model(tmp_path / "m0", rng, added=["<x>"], like=base)
    families.save(tmp_path / "m0", m0 | {EMBED: np.vstack([m0[EMBED], m0[EMBED][:4]])})
    with pytest.raises(HomologyError, match="has 16 rows, and another tensor 12"):
        notes(tmp_path, tokenizer_source="union")


def test_gaps_in_ids_are_refused_where_tokens_are_added(tmp_path):
    """A loader numbers added tokens itself: it would not give them the ids of their rows."""
    rng = np.random.default_rng(10)
    base = model(tmp_path / "base", rng, rows=16)
    model(tmp_path / "m0", rng, added=["<x>"], rows=16, like=base)
    path = tmp_path / "base" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["h"] = 14
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match="numbers its tokens with gaps"):
        notes(tmp_path, tokenizer_source="union")


# --- stacks, and statistics


def layer(path, name):
    return {"model": str(path / name), "layer_range": [0, 1]}


def test_a_union_of_slices_is_that_of_models(three):
    """Where all slices have the same sources, slices change nothing but the number of layers."""
    path, *_ = three
    plain, tokens, config, _ = merged(path, tokenizer_source="union")
    sources = {"sources": [layer(path, "m0"), layer(path, "m1")]}
    recipe = {"slices": [sources, sources], "base_model": str(path / "base"), "merge_method": "linear"}
    dk.merge({**recipe, "tokenizer_source": "union"}, path / "stack")
    found = families.load(path / "stack")
    for name in (EMBED, HEAD):
        assert np.allclose(found[name], plain[name], rtol=0, atol=1e-8), name  # on the base there, a plain sum here
    document = json.loads((path / "stack" / "tokenizer.json").read_text())
    assert [entry["content"] for entry in document["added_tokens"]][-2:] == tokens[-2:] == ["<x>", "<y>"]
    written = json.loads((path / "stack" / "config.json").read_text())
    assert written["vocab_size"] == config["vocab_size"] == len(tokens) and written["num_hidden_layers"] == 2


@pytest.mark.parametrize("source", ["union", "m1"])
def test_a_stack_says_what_its_givers_lack(three, source):
    """m0 gives the embedding and m1 the head: m1's own token has a row in the head, and none in the embedding."""
    path, _, m0, m1 = three
    said = []
    recipe = {"slices": [{"sources": [layer(path, "m0")]}, {"sources": [layer(path, "m1")]}]}
    named = source if source == "union" else str(path / source)
    dk.merge({**recipe, "merge_method": "passthrough", "tokenizer_source": named}, path / "out", say=said.append)
    found = families.load(path / "out")
    document = json.loads((path / "out" / "tokenizer.json").read_text())
    at = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    assert np.array_equal(found[EMBED][at["<x>"]], m0[EMBED][11]) and not found[EMBED][at["<y>"]].any()
    assert np.array_equal(found[HEAD][at["<x>"]], m1[HEAD][12])  # in m1, <y> comes first
    assert np.array_equal(found[HEAD][at["<y>"]], m1[HEAD][11])
    assert any(
        note.startswith(f"WARNING: no model that gives {EMBED} has rows for <y>: they are zeros") for note in said
    )


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_statistics_of_moved_rows_are_refused(three, method, kind):
    """A statistic speaks of rows as its model has them; nothing is merged by wrong ones."""
    path, *_ = three
    models = [{"model": str(path / f"m{k}"), "stats": str(path / f"m{k}.{kind}.safetensors")} for k in range(2)]
    for entry in models:
        with closing(open_checkpoint(entry["model"])) as one:
            digest, shapes = sample_digest(one).hex(), {name: info.shape for name, info in one.tensors.items()}
        facts = {"norm": 1.0, "mean": 1.0}
        if kind == "gram":
            shapes = {name: (shape[1], shape[1]) for name, shape in shapes.items() if "proj" in name}
            facts = {"rows": dict.fromkeys(shapes, 9), "same_input": {}, "transposed": []}
        document = {"format": FORMAT, "kind": kind, "model": "m", "model_digest": digest, "examples": 1, "tokens": 9}
        values = {name: np.eye(*shape, dtype=np.float32) if len(shape) == 2 else np.ones(shape, np.float32)
                  for name, shape in shapes.items()}  # fmt: skip
        write_statistics(Path(entry["stats"]), shapes, values.__getitem__, document | facts)
    recipe = {"base_model": str(path / "base"), "models": models, "merge_method": method}
    message = rf"{method} reads statistics of rows as the models have them.*lm_head.weight.*give the models one vocab"
    with pytest.raises(PlanError, match=message):
        dk.merge({**recipe, "tokenizer_source": "union"}, path / "out")
    assert not (path / "out").exists()
