# SPDX-License-Identifier: Apache-2.0
"""One way in: whatever is named as a model or a base is opened through one list of openers."""

import json
from contextlib import closing

import pytest

import darekit as dk
import families
from darekit.analysis import inspection
from darekit.checkpoints import open_checkpoint, sample_digest
from darekit.errors import CheckpointError, HoldsPack, PlanError
from darekit.inputs import opening
from darekit.inputs.kinds import Opener
from darekit.inputs.opening import open_base, open_model
from darekit.inputs.slices import layers, renamed
from darekit.planning import opening as planned
from darekit.planning.opening import OPENERS, only_on_base

STORED = OPENERS[-1:]


@pytest.fixture
def packed(llamas, tmp_path):
    """A pack, alone in its folder."""
    (tmp_path / "pack").mkdir()
    file = tmp_path / "pack" / "m0.safetensors"
    dk.pack(llamas.path / "base", llamas.path / "m0", file, drop_rate=0.5)
    return file


def test_the_first_that_recognises_a_name_opens_it(llamas):
    asked = []

    def find(kind, answer):
        def found(opening):
            asked.append((kind, opening.ref))
            return answer

        return found

    openers = (
        Opener("one", find("one", None), pytest.fail),
        Opener("two", lambda o: "found" if o.ref == "x" else None, lambda o: o.open(llamas.path / "m0")),
        *STORED,
    )
    with closing(open_model("x", None, openers=openers)) as model:
        assert model.ref == str(llamas.path / "m0")
    assert asked == [("one", "x"), ("one", llamas.path / "m0")], "what it is made of passes all openers"
    with pytest.raises(CheckpointError, match="x is not a kind of input"):
        open_model("x", None, openers=openers[:1])


def test_a_name_is_looked_up_in_the_working_directory_and_then_in_search(llamas, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []

    def find(opening):
        seen.append(opening.path)

    openers = (Opener("nothing", find, pytest.fail), *STORED)
    for name in ("m0", str(llamas.path / "m0")):
        open_model(name, None, search=[llamas.path], openers=openers).close()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_model("nowhere", None, search=[llamas.path], openers=openers)
    assert seen == [llamas.path / "m0", llamas.path / "m0", None]


def test_a_pack_needs_its_base_and_is_none(llamas, packed):
    kind, found = only_on_base(packed)
    assert (kind.kind, found) == ("a pack", packed) and only_on_base(llamas.path / "m0") is None
    with closing(open_base(llamas.path / "base", openers=OPENERS)) as base:
        for ref in (packed, str(packed), packed.parent):
            with closing(open_model(ref, base, openers=OPENERS)) as model:
                assert model.ref == str(packed) and opening.packed_seed(model) is not None
            with pytest.raises(
                PlanError, match=r"is a pack: it can only be used with its base; name the base .* `dare unpack"
            ):
                open_model(ref, None, openers=OPENERS)
            with pytest.raises(HoldsPack, match="is a darekit pack, which is a delta and not a checkpoint"):
                open_base(ref, openers=OPENERS)
            with pytest.raises(HoldsPack):  # nobody here opens packs
                open_model(ref, base, openers=STORED)
        assert opening.packed_seed(base) is None


def test_every_command_opens_through_planning(llamas, monkeypatch, tmp_path):
    """A kind of input that one line brings is known to all: here "1:REF", a model with its last layer alone."""

    def find(opening):
        return str(opening.ref)[2:] if str(opening.ref).startswith("1:") else None

    kind = Opener("a layer", find, lambda opening: layers(opening.open(opening.ref), 1, 2))
    monkeypatch.setattr(planned, "OPENERS", (kind, *OPENERS))
    names = {name: f"1:{llamas.path / name}" for name in ("base", "m0", "m1")}
    found = inspection.inspect(names["base"], names["m0"])
    assert {tensor.name for tensor in found.tensors} == {name for name in llamas.base if ".1." not in name}
    data = {
        "base_model": names["base"], "models": [{"model": names["m0"]}, {"model": names["m1"]}],
        "merge_method": "task_arithmetic", "sparsify": {"method": "dare", "drop_rate": 0.7},
    }  # fmt: skip
    with pytest.raises(PlanError, match=r"layers\.0\.\S+ is stored as model\.layers\.1\..*write the model out first"):
        dk.pack(names["base"], names["m0"], tmp_path / "m.safetensors", drop_rate=0.5)
    dk.merge(data, tmp_path / "out")
    whole = families.recipe(llamas.path, k=2, sparsify=data["sparsify"])
    dk.merge(whole, tmp_path / "whole")
    expected = families.load(tmp_path / "whole")
    for name, array in families.load(tmp_path / "out").items():
        assert array.tobytes() == expected[name.replace("layers.0.", "layers.1.")].tobytes()
    lock, other = (json.loads((tmp_path / out / "darekit.lock.json").read_text()) for out in ("out", "whole"))
    assert lock["effective_seeds"] == other["effective_seeds"]
    assert [entry["sample_digest"] for entry in lock["inputs"]] == [entry["sample_digest"] for entry in other["inputs"]]
    assert [entry["content_digest"] for entry in lock["inputs"]] == [None] * 3


def test_a_view_has_no_directory_of_its_own(llamas):
    with closing(open_checkpoint(llamas.path / "m0")) as model:
        view = renamed(model, {name: name for name in model.tensors})
        assert view.directory is None and view.companions == model.companions
        assert sample_digest(view) == sample_digest(model)
