# SPDX-License-Identifier: Apache-2.0
"""Tokens of several tokenizers, and the files that say so, as data: by hand, without a model."""

import json

import pytest

from darekit.checkpoints.tokenizers import AddedToken
from darekit.errors import PlanError
from darekit.tokens.documents import rewritten
from darekit.tokens.joining import Part, join

SPECIAL = frozenset({"special"})


def part(tokens, added=(), rows=99):
    """Tokens by id (a dict, or one behind another); added ones as (text, id, flags)."""
    entries = tuple(AddedToken(content, at, frozenset(flags)) for content, at, flags in added)
    ids = dict(tokens) if isinstance(tokens, dict) else {content: at for at, content in enumerate(tokens)}
    ids |= {entry.content: entry.id for entry in entries}
    return Part(type("T", (), {"vocabulary": ids, "added": entries}), rows)


# --- which tokens


def test_tokens_count_by_id_and_only_with_a_row():
    assert [*part({"z": 0, "b": 2, "a": 2, "y": 1, "x": 3}, rows=3).tokens()] == [
        ("z", 0),
        ("y", 1),
        ("a", 2),
        ("b", 2),
    ]
    assert [*part("abc", rows=2).tokens()] == [("a", 0), ("b", 1)]


def test_alone_it_is_the_owners():
    joined = join([part("ab"), part("xyz", [("<s>", 3, SPECIAL)], rows=3)], 1, union=False)
    assert dict(joined.ids) == {"x": 0, "y": 1, "z": 2} and joined.owner == 1
    assert (joined.added, joined.new, joined.removed, joined.size, joined.changed) == ((), (), ("<s>",), 3, False)
    nothing = join([part("")], 0, union=False)
    assert nothing.size == 0 and not nothing.changed and nothing.ids == {}
    assert dict(join([part(""), part("ab")], 0, union=True).ids) == {"a": 0, "b": 1}


def test_a_union_keeps_the_owners_ids_and_appends_the_others():
    """From the one behind the owner's largest id on, whatever gaps there are."""
    parts = [part("abq"), part({"b": 0, "c": 5}, [("<s>", 9, SPECIAL)]), part("cd")]
    joined = join(parts, 1, union=True)
    assert dict(joined.ids) == {"b": 0, "c": 5, "<s>": 9, "a": 10, "q": 11, "d": 12} and joined.size == 13
    assert [(one.token.content, one.token.id, one.part, one.ordinary) for one in joined.new] == [
        ("a", 10, 0, True), ("q", 11, 0, True), ("d", 12, 2, True),
    ]  # fmt: skip
    assert [token.content for token in joined.added] == ["<s>", "a", "q", "d"] and joined.added[0].flags == SPECIAL


def test_flags_are_those_of_whoever_has_the_token_first():
    parts = [
        part("ab", [("<s>", 2, SPECIAL)]), part("ab", [("<s>", 2, ()), ("<t>", 3, ["lstrip"]), ("b", 1, SPECIAL)]),
        part("ab", [("<s>", 2, SPECIAL), ("<t>", 3, ()), ("b", 1, ()), ("c", 4, SPECIAL)]),
    ]  # fmt: skip
    joined = join(parts, 0, union=True)
    assert {token.content: token.flags for token in joined.added} == {
        "<s>": SPECIAL, "<t>": {"lstrip"}, "b": SPECIAL, "c": SPECIAL,
    }  # fmt: skip
    assert joined.conflicts == (("<s>", 1), ("b", 2), ("<t>", 2))
    assert joined.marked == (AddedToken("b", 1, SPECIAL),) and joined.changed
    assert [(one.token.content, one.part, one.ordinary) for one in joined.new] == [("<t>", 1, False), ("c", 2, False)]
    marked = join([part("ab"), part("ab", [("b", 1, SPECIAL)])], 0, union=True)
    assert not marked.new and marked.changed
    assert join(parts, 0, union=False).conflicts == () and len(join(parts, 0, union=False).added) == 1


def test_named_tokens_come_last_and_belong_to_whoever_has_a_row_of_them():
    parts = [part("ab"), part("abcd", rows=3), part("abcd")]
    joined = join(parts, 0, union=False, named=["new", "d", "c", "a", "new"])
    assert dict(joined.ids) == {"a": 0, "b": 1, "new": 2, "d": 3, "c": 4}
    assert [(one.token, one.part, one.ordinary) for one in joined.new] == [
        (AddedToken("new", 2), None, False), (AddedToken("d", 3), 2, False), (AddedToken("c", 4), 1, False),
    ]  # fmt: skip
    assert [token.content for token in joined.added] == ["new", "d", "c"]


def test_removed_tokens_are_told_by_id():
    joined = join([part({"a": 0, "z": 7, "y": 5, "x": 5}, rows=5)], 0, union=False)
    assert joined.removed == ("x", "y", "z") and dict(joined.ids) == {"a": 0}


# --- the files


FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def entry(content, at, *flags):
    return {"id": at, "content": content, **{flag: flag in flags for flag in FLAGS}}


def files(vocab, added=(), *, config=None, legacy=None, model=None, **more):
    document = {"added_tokens": [*added], "model": {"vocab": vocab, **(model or {})}}
    found = {"tokenizer.json": document, **more}
    if config is not None:
        found["tokenizer_config.json"] = config
    if legacy is not None:
        found["added_tokens.json"] = legacy
    return {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in found.items()}


def read(made, name="tokenizer.json"):
    return json.loads(made[name])


def test_new_and_marked_tokens_are_written_everywhere():
    vocab = {"a": 0, "b": 1, "é": 2}
    own = part(vocab, [("<s>", 3, SPECIAL)])
    joined = join([own, part("ab", [("b", 1, SPECIAL), ("<x>", 3, ["lstrip", "special"])])], 0, union=True)
    decoder = {"3": {"content": "<s>", "special": True}, "10": {"content": "<late>"}}
    beside = files(
        vocab, [entry("<s>", 3, "special")], config={"a": 1, "added_tokens_decoder": decoder}, legacy={"<s>": 3},
        **{"vocab.json": b"old", "other.json": b"none of the tokenizer's"},
    )  # fmt: skip
    made = rewritten("hub/m", beside, joined)
    assert read(made)["added_tokens"] == [
        entry("b", 1, "special"),
        entry("<s>", 3, "special"),
        entry("<x>", 4, "lstrip", "special"),
    ]
    assert read(made)["model"]["vocab"] == vocab and "é".encode() in made["tokenizer.json"]
    found = read(made, "tokenizer_config.json")
    assert found["a"] == 1 and [*found["added_tokens_decoder"]] == ["1", "3", "4", "10"]
    assert found["added_tokens_decoder"]["1"] == {
        key: value for key, value in entry("b", 1, "special").items() if key != "id"
    }
    assert found["added_tokens_decoder"]["3"] == decoder["3"]
    assert read(made, "added_tokens.json") == {"<s>": 3, "b": 1, "<x>": 4}
    assert made["vocab.json"] == b"old" and "other.json" not in made  # nothing is removed, so it stays right
    plain = rewritten("hub/m", files(vocab, [entry("<s>", 3)], config={"a": 1}), joined)
    assert read(plain, "tokenizer_config.json") == {"a": 1} and "added_tokens.json" not in plain


def test_tokens_without_a_row_leave_no_trace():
    vocab = {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}
    for merges in ([["a", "b"], ["ab", "c"], ["b", "a"]], ["a b", "ab c", "b a"]):
        own = part(vocab, [("<s>", 5, ())], rows=3)
        joined = join([own], 0, union=False, named=["<n>"])
        beside = files(
            vocab, [entry("<s>", 5)], model={"merges": merges}, legacy={"<s>": 5, "kept": 1},
            config={"added_tokens_decoder": {"5": {"content": "<s>"}}}, **{"vocab.json": b"", "tokenizer.model": b""},
        )  # fmt: skip
        made = rewritten("hub/m", beside, joined)
        assert read(made)["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2}
        assert read(made)["model"]["merges"] == [merges[0], merges[2]]
        assert read(made)["added_tokens"] == [entry("<n>", 3)]
        assert [*read(made, "tokenizer_config.json")["added_tokens_decoder"]] == ["3"]
        assert read(made, "added_tokens.json") == {"kept": 1, "<n>": 3}
        assert sorted(made) == ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_merge_that_makes_a_removed_token_goes_with_it():
    vocab = {"a": 0, "b": 1, "ab": 2}
    joined = join([part(vocab, rows=2)], 0, union=False, named=["<n>"])
    made = rewritten("m", files(vocab, model={"merges": ["a b"]}), joined)
    assert read(made)["model"]["merges"] == []
    assert read(rewritten("m", files(vocab, model={"merges": None}), joined))["model"]["merges"] is None


def test_pieces_with_scores():
    pieces = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]
    own = part({"<unk>": 0, "a": 1, "b": 2}, rows=2)
    joined = join([own], 0, union=False, named=["<n>"])
    made = rewritten("m", files(pieces), joined)
    assert read(made)["model"]["vocab"] == pieces[:2] and read(made)["added_tokens"] == [entry("<n>", 2)]
    whole = rewritten("m", files(pieces), join([part({"<unk>": 0, "a": 1, "b": 2})], 0, union=False, named=["<n>"]))
    assert read(whole)["model"]["vocab"] == pieces


def test_ids_that_a_loader_would_not_give_are_refused():
    """It counts on from the vocabulary, or from the last added token behind it."""
    for ids, fine in (
        ({"<s>": 2, "<t>": 3}, True), ({"<s>": 3}, False), ({"<s>": 2, "<t>": 4}, False), ({"a": 0, "<s>": 2}, True),
        ({"<s>": 2, "b": 1, "<t>": 3}, True),
    ):  # fmt: skip
        own = part({"a": 0, "b": 1}, [(content, at, ()) for content, at in ids.items()])
        joined = join([own], 0, union=False, named=[])
        beside = files({"a": 0, "b": 1}, [entry(content, at) for content, at in ids.items()])
        if fine:
            assert len(read(rewritten("hub/m", beside, joined))["added_tokens"]) == len(ids)
            continue
        with pytest.raises(
            PlanError, match=r"tokenizer.json of hub/m numbers its tokens with gaps, .* token '<[st]>' the id [23]"
        ):
            rewritten("hub/m", beside, joined)


def test_a_vocabulary_of_added_tokens_alone():
    joined = join([part({}, [("<s>", 0, ()), ("<t>", 1, ())])], 0, union=False)
    beside = files({}, [entry("<s>", 0), entry("<t>", 1)])
    assert read(rewritten("hub/m", beside, joined))["added_tokens"] == [entry("<s>", 0), entry("<t>", 1)]


def test_there_must_be_a_file_to_write():
    joined = join([part("a")], 0, union=False, named=["b"])
    with pytest.raises(PlanError, match=r"^hub/m has no tokenizer at all and no tokenizer.json"):
        rewritten("hub/m", {"other.txt": b""}, joined)
    with pytest.raises(PlanError, match=r"^hub/m has tokenizer.model, vocab.json and no tokenizer.json"):
        rewritten("hub/m", {"vocab.json": b"", "tokenizer.model": b""}, joined)
