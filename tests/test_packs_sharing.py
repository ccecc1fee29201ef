# SPDX-License-Identifier: Apache-2.0
"""Pushing and pulling packs: huggingface_hub's own client against a stand-in of the Hub, and folders."""

import json
import shutil

import pytest
import yaml

import darekit as dk
import families
from darekit.errors import CheckpointError, OutputError, PlanError
from hub_server import dare


@pytest.fixture
def packed(llamas, tmp_path):
    """base and m0 are those of `llamas`; the pack is m0.pack.safetensors."""
    dk.pack(llamas.path / "base", llamas.path / "m0", tmp_path / "m0.pack.safetensors", drop_rate=0.9, bits=4, seed=7)
    return tmp_path / "m0.pack.safetensors"


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_pack_goes_to_the_hub_and_comes_back(hub, llamas, packed, tmp_path):
    base, commit = llamas.path / "base", "0123456789abcdef0123456789abcdef01234567"
    there = tmp_path / "there"
    there.mkdir()
    options = ("--base-model", f"org/base@{commit}", "--license", "apache-2.0", "--private")
    done = dare(hub, tmp_path, "push", packed, "me/math", *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["files"] == ["m0.pack.safetensors", "README.md"] and found["commit"] == hub.commit("me/math")
    assert hub.repositories["me/math"]["m0.pack.safetensors"] == packed.read_bytes() and hub.private["me/math"]
    assert hub.messages == ["Add m0.pack.safetensors with darekit"]

    card = hub.repositories["me/math"]["README.md"].decode()
    assert hub.validated == [card]
    metadata = front_matter(card)
    assert metadata["base_model"] == ["org/base"] and metadata["base_model_relation"] == "quantized"
    assert metadata["base_model_revision"] == commit and metadata["license"] == "apache-2.0"
    assert "delta" in metadata["tags"]
    for line in ("dare pull me/math", f"dare unpack org/base@{commit} m0.pack.safetensors m0"):
        assert f"\n{line}\n" in card

    done = dare(hub, there, "pull", "me/math", token=None)
    assert done.returncode == 0, done.stderr
    assert (there / "m0.pack.safetensors").read_bytes() == packed.read_bytes()
    assert "tensors, intact" in done.stdout and "dare unpack BASE m0.pack.safetensors OUT" in done.stdout

    # By its name on the Hub a pack goes wherever one goes.
    (there / "r.yaml").write_text(f"base_model: {base}\nmodels: [{{model: me/math}}]\nmerge_method: task_arithmetic\n")
    for arguments in (("merge", "r.yaml", "merged"), ("unpack", base, "me/math/m0.pack.safetensors@main", "unpacked")):
        done = dare(hub, there, *arguments)
        assert done.returncode == 0, done.stderr
    dk.unpack(base, packed, tmp_path / "expected")
    for name in ("merged", "unpacked"):
        families.same(families.load(there / name), families.load(tmp_path / "expected"))


def test_a_card_that_is_there_is_kept(hub, packed, tmp_path):
    hub.repositories["me/math"] = {"README.md": b"edited"}
    done = dare(hub, tmp_path, "push", packed, "me/math", "--base-model", "org/base")
    assert done.returncode == 0 and "README.md already exists and was kept" in done.stderr
    assert hub.repositories["me/math"]["README.md"] == b"edited"
    assert dare(hub, tmp_path, "push", packed, "me/math", "--base-model", "org/base", "--new-card").returncode == 0
    assert front_matter(hub.repositories["me/math"]["README.md"].decode())["base_model"] == ["org/base"]


def test_what_the_hub_refuses_is_said(hub, packed, tmp_path):
    done = dare(hub, tmp_path, "push", packed, "me/math", "--base-model", "org/base", token="hf_wrong")
    assert done.returncode == 1 and "cannot be pushed to" in done.stderr and "hf auth login" in done.stderr
    assert not hub.repositories
    done = dare(hub, tmp_path, "pull", "me/none")
    assert done.returncode == 1 and "me/none is not on the Hub" in done.stderr
    hub.repositories["me/broken"] = {"m.pack.safetensors": packed.read_bytes()[:-1] + b"\x55"}
    done = dare(hub, tmp_path, "pull", "me/broken", "copy")
    assert done.returncode == 1 and not (tmp_path / "copy").exists()
    done = dare(hub, tmp_path, "pull", "me/broken/other.safetensors")
    assert done.returncode == 1 and "has no file other.safetensors" in done.stderr


def test_a_folder_takes_a_pack_and_gives_it(llamas, packed, tmp_path):
    said = []
    pushed = dk.push(packed, tmp_path / "share", say=said.append)
    assert pushed.files == ("m0.pack.safetensors", "README.md") and pushed.commit is None
    assert any("no license" in line for line in said)
    card = (tmp_path / "share/README.md").read_text()
    assert "base_model" not in front_matter(card) and "dare unpack BASE m0.pack.safetensors m0" in card
    assert dk.push(packed, tmp_path / "share").files == ("m0.pack.safetensors",)

    pulled = dk.pull(tmp_path / "share", tmp_path / "copy")
    assert pulled.pack == str(tmp_path / "copy/m0.pack.safetensors") and pulled.base["ref"] == "base"
    assert (tmp_path / "copy/m0.pack.safetensors").read_bytes() == packed.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        dk.pull(tmp_path / "share", tmp_path / "copy")
    dk.pull(tmp_path / "share", tmp_path / "copy/x.safetensors")
    dk.pull(tmp_path / "share", tmp_path / "copy/x.safetensors", overwrite=True)
    # The folder itself is a pack's name.
    dk.unpack(llamas.path / "base", tmp_path / "share", tmp_path / "out")
    recipe = {"base_model": str(llamas.path / "base"), "models": [{"model": str(tmp_path / "share")}],
              "merge_method": "task_arithmetic"}  # fmt: skip
    dk.merge(recipe, tmp_path / "merged")
    families.same(families.load(tmp_path / "out"), families.load(tmp_path / "merged"))


def test_a_card_of_an_exact_pack(llamas, tmp_path):
    (tmp_path / "m").mkdir()
    for path in (llamas.path / "m0").iterdir():
        (tmp_path / "m" / path.name).symlink_to(path)
    (tmp_path / "m/README.md").write_text("---\nlicense: mit\n---\n")
    dk.pack(llamas.path / "base", tmp_path / "m", tmp_path / "m.safetensors", lossless=True)
    dk.push(tmp_path / "m.safetensors", tmp_path / "share", base_model="org/base")
    metadata = front_matter((tmp_path / "share/README.md").read_text())
    assert metadata["base_model_relation"] == "finetune" and metadata["license"] == "mit"
    assert (tmp_path / "share/m.pack.safetensors").exists() and "base_model_revision" not in metadata


def test_pushes_and_pulls_that_are_refused(llamas, packed, tmp_path):
    with pytest.raises(PlanError, match="packed against base, a local name"):
        dk.push(packed, "me/math")
    with pytest.raises(PlanError, match="not a Hub id"):
        dk.push(packed, "me/math", base_model="base")
    with pytest.raises(PlanError, match="leave out the @"):
        dk.push(packed, "me/math@v2", base_model="org/base")
    with pytest.raises(OutputError, match="is a file"):
        dk.push(packed, packed, base_model="org/base")
    with pytest.raises(CheckpointError, match="whole checkpoint, not a pack"):
        dk.pull(llamas.path / "base")
    with pytest.raises(
        CheckpointError, match=r"none does not exist: looked for .*; expected a file written by `dare pack`"
    ):
        dk.pull(tmp_path / "none")
    for action in (lambda to: dk.push(packed, to, base_model="org/base"), dk.pull):
        with pytest.raises(CheckpointError, match=r"is an address; give the name that the Hub knows it by: me/math$"):
            action("https://huggingface.co/me/math/tree/main")
    with pytest.raises(OutputError, match="copied onto itself"):
        dk.pull(packed, packed.parent, overwrite=True)
    whole = bytearray(packed.read_bytes())
    whole[-1] ^= 4
    packed.write_bytes(whole)
    for action in (lambda: dk.push(packed, tmp_path / "share"), lambda: dk.pull(packed, tmp_path / "copy")):
        with pytest.raises(CheckpointError):
            action()
    assert not (tmp_path / "share").exists() and not (tmp_path / "copy").exists()


def test_a_pack_that_is_not_where_it_was_said_to_be(llamas, packed, tmp_path):
    with pytest.raises(CheckpointError, match=r"did you mean .*m0\.pack\.safetensors\?$"):
        dk.pull(packed.with_name("m0.pakc.safetensors"))
    with pytest.raises(CheckpointError, match=r"did you mean .*m0\.pack\.safetensors\?$"):
        dk.pull(packed.with_name("m0"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder holds no pack; expected one file"):
        dk.pull(tmp_path / "folder")
    shutil.copy(packed, tmp_path / "folder" / "a.safetensors")
    (tmp_path / "folder" / "README.md").write_text("words")
    assert dk.pull(tmp_path / "folder", tmp_path / "copy").pack == str(tmp_path / "copy" / "a.safetensors")
    shutil.copy(packed, tmp_path / "folder" / "b.safetensors")
    shutil.copy(llamas.path / "base/model.safetensors", tmp_path / "folder" / "c.safetensors")
    with pytest.raises(
        CheckpointError, match=r"3 safetensors files; these are packs: a\.safetensors, b\.safetensors\. "
    ):
        dk.pull(tmp_path / "folder")
    # A damaged one is known for a pack, and said to be damaged.
    for name in "ab":
        (tmp_path / "folder" / f"{name}.safetensors").unlink()
    (tmp_path / "folder" / "c.safetensors").write_bytes(packed.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="truncated"):
        dk.pull(tmp_path / "folder")


def test_a_base_and_a_pack_that_have_changed_places(llamas, packed, tmp_path, dare):
    base = llamas.path / "base"
    for command in (("unpack", packed, base, tmp_path / "out"), ("verify", base, packed),
                    ("verify", base / "model.safetensors", packed)):  # fmt: skip
        told = dare(*command)
        assert told.code == 1 and f"so they are swapped; the base is {base}" in told.err
    for command in (("verify", packed, packed), ("unpack", packed, packed, tmp_path / "out"),
                    ("export", packed, tmp_path / "out", "--to", "vllm-patch", "--base", packed)):  # fmt: skip
        told = dare(*command)
        assert told.code == 1 and f"is given as the base of {packed}" in told.err, told.err
    assert not (tmp_path / "out").exists()
