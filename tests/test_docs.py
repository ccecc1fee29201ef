# SPDX-License-Identifier: Apache-2.0
"""The documents tell the truth: examples run, links lead somewhere, options exist, generated pages are current.

An example that must run stands behind a line `<!-- run -->` (shell or Python) or `<!-- run: name.yaml -->` (a recipe,
which is saved under that name). The examples of one document run in order in one folder, which looks like `demo/`
after `make demo`. A block behind `<!-- output -->` shows what a command before it said: the numbers may differ.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import conftest
import families
from darekit.checkpoints import ArrayBytes, Checkpoint, TensorInfo, sample_digest
from darekit.digests import TensorDigest, checkpoint_digest, tensor_digest
from darekit.masks import draws, effective_seeds, kept, stream_of, threshold_of
from darekit.recipe import read_recipe

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(
    r"(?:<!-- (?P<marker>run|output)(?:: (?P<file>\S+))? -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
OTHERS_FLAGS = {"--random-seed"}  # mergekit's


def blocks(document):
    """(kind, text, file to save it as, "run" or "output" or None) of every fenced block."""
    for match in FENCE.finditer(document.read_text(encoding="utf-8")):
        yield match["kind"], match["text"], match["file"], match["marker"]


def name_of(path):
    return str(path.relative_to(ROOT))


def shape(line):
    """A line without its numbers, their units and its spacing."""
    return " ".join(re.sub(r"\d[\d.]*( [kMGT]?B?\b)?", "#", line).split())


RUNNABLE = [path for path in DOCUMENTS if any(marker == "run" for *_, marker in blocks(path))]


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A folder as `make demo` leaves it: a base and three models fine-tuned from it, and the examples."""
    path = tmp_path_factory.mktemp("demo")
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    families.save(path / "base", base, families.config())
    for name in ("reverse", "sort", "shift"):
        families.save(path / name, families.tuned(rng, base), families.config())
        conftest._tokenizer(path / name)
    conftest._tokenizer(path / "base")
    for example in (ROOT / "examples").glob("*.yaml"):
        shutil.copy(example, path)
    # Its data too, in words of this tokenizer.
    for name, count in (("reverse", 8), ("sort", 8), ("shift", 8)):
        for part in ("", ".validation", ".test"):
            rows = [{"prompt": f"w{3 + i} w{4 + i} ", "completion": f"w{5 + i}"} for i in range(count)]
            (path / f"{name}{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": f"w{3 + i} w{4 + i}"}) + "\n" for i in range(8)))
    return path


@pytest.mark.parametrize("document", RUNNABLE, ids=name_of)
def test_the_examples_run(document, family, tmp_path, monkeypatch, dare):
    folder = tmp_path / "demo"
    shutil.copytree(family, folder)
    monkeypatch.chdir(folder)
    said = set()
    for kind, text, file, marker in blocks(document):
        if marker == "output":
            for line in text.splitlines():
                assert shape(line) in said, f"{name_of(document)} shows what nothing says: {line}"
        if marker != "run":
            continue
        if file is not None:
            Path(file).write_text(text)
            if kind == "yaml":
                read_recipe(file)
        elif kind == "python":
            if "safetensors.torch" in text:
                pytest.importorskip("safetensors.torch")
            exec(compile(text, name_of(document), "exec"), {"__name__": "example"})
        else:
            for line in text.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                if program == "dare":
                    done = dare(*arguments)
                    assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
                    said |= {shape(line) for line in (done.out + done.err).splitlines()}
                else:
                    subprocess.run([program, *arguments], check=True)


@pytest.mark.parametrize("document", RUNNABLE, ids=name_of)
def test_every_command_that_is_shown_runs(document):
    for kind, text, _, marker in blocks(document):
        if kind == "sh" and re.search(r"^dare (merge|drop|inspect)", text, re.M):
            assert marker, f"{name_of(document)} shows a command that no test runs:\n{text}"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_files_run(example, family, tmp_path, monkeypatch, dare):
    monkeypatch.chdir(family)
    assert dare("merge", example.name, tmp_path / "out").code == 0


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current():
    assert generator().stale() == [], "run `make docs`"


def test_a_stale_page_is_noticed(tmp_path, monkeypatch):
    module = generator()
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert module.stale() == ["methods.md", "cli.md"] and module.main() == 1
    monkeypatch.setattr("sys.argv", ["generate.py"])
    assert module.main() == 0 and module.stale() == []
    (tmp_path / "cli.md").write_text("old")
    assert module.stale() == ["cli.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert (document.parent / target.split("#")[0]).exists(), f"{name_of(document)} links to {target}"


def test_the_architecture_names_files_that_exist():
    files = [f"/{path.relative_to(ROOT)}" for path in (ROOT / "src").rglob("*.py")] + ["/tests/test_imports.py"]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").replace("\\", "")
    named = set(re.findall(r"(?<![\w/])[a-z_]+(?:/[a-z_]+)*\.py\b", text))
    assert {"planning.py", "tiles.py"} <= named
    for name in named:
        assert any(path.endswith(f"/{name}") for path in files), name
    folders = re.findall(r"^ +\| +(?:\| +)?([a-z]+)/ ", text, re.M)
    assert "checkpoints" in folders
    for folder in folders:
        assert (ROOT / "src" / "darekit" / folder).is_dir(), folder


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for document in DOCUMENTS:
        for target in re.findall(r"`(?:[A-Z]+=\S+ )?make (\w+)`", document.read_text(encoding="utf-8")):
            assert target in targets, f"{name_of(document)} names make {target}"
    assert {"demo", "test"} <= targets


def test_options_that_are_named_exist():
    known = set(re.findall(r"`(--?[a-z][a-z-]*)`", generator().cli_page())) | {"--help", "--version"} | OTHERS_FLAGS
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        spans = [*re.findall(r"`([^`\n]*)`", text), *(block for kind, block, *_ in blocks(document) if kind == "sh")]
        for span in spans:
            if re.search(r"\.py|pip |git |hf |ruff|pytest|BENCH=", span):  # another program's options
                continue
            for flag in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", span):
                assert flag in known, f"{name_of(document)} names {flag}"


def test_documents_name_no_machine():
    for document in [*DOCUMENTS, ROOT / "CITATION.cff"]:
        text = document.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text), name_of(document)


# --- docs/formats.md: its known answers are the code's


FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_known_answers_of_the_mask():
    rows = re.findall(r"^\| ([\d^+ ]+) \| `(\S+)` \| `(\w+)` \| `([\w ]+)` \| ([\d ]+) \|$", FORMATS, re.M)
    assert len(rows) == 3
    for seed, name, stream, words, first in rows:
        number = sum(2 ** int(part.split("^")[1]) if "^" in part else int(part) for part in seed.split("+"))
        assert stream_of(name) == int(stream, 16)
        found = [f"{draws(number, stream_of(name), e, 1)[0]:08x}" for e in (0, 1, 255, 256, 1023, 1024, 2999)]
        assert found == words.split()
        assert np.flatnonzero(kept(number, stream_of(name), 0, 200, 0.9))[:6].tolist() == [*map(int, first.split())]
    for offset, word in ((5, "8a95f27c"), (1029, "6122140e")):
        assert f"element 2^34 + {offset} draws `{word}`" in FORMATS
        assert draws(0, stream_of("w"), 2**34 + offset, 1)[0] == int(word, 16)
    assert f"The threshold of p = 0.9 is {threshold_of(0.9)}." in FORMATS
    zeros = bytes(16)
    for number in (*effective_seeds(42, [bytes(range(16)), zeros]), *effective_seeds(42, [zeros, zeros])):
        assert str(number) in FORMATS


def test_known_answers_of_the_digests():
    raws = {"w": np.arange(12, dtype="<f4").view(np.uint8), "b": np.array([0, 0, 0x80, 0x3F], np.uint8)}
    headers = {"w": ("F32", (3, 4), 4), "b": ("BF16", (2,), 2)}
    infos, rows = {}, []
    for name, (dtype, shape, size) in headers.items():
        infos[name] = TensorInfo(name, dtype, shape, ArrayBytes(raws[name]))
        digest = TensorDigest(size)
        digest.update(raws[name])
        rows.append((name, dtype, shape, tensor_digest(digest.finish())))
        assert f"`{name}` `{rows[-1][-1]}`" in FORMATS
    checkpoint = Checkpoint(ref="x", directory=None, tensors=infos, config=None, files=(), revision=None)
    assert f"`{sample_digest(checkpoint).hex()}`" in FORMATS
    assert f"the checkpoint `{checkpoint_digest(rows)}`" in FORMATS


def test_the_readme_cites_what_the_cards_cite():
    from darekit.output.card import CITATION

    assert f"```bibtex\n{CITATION}```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_bench_finds_its_place_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- bench:begin -->") == text.count("<!-- bench:end -->") == 1


def test_the_check_of_the_generator_is_a_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    script = str(ROOT / "docs" / "generate.py")
    done = subprocess.run(
        [sys.executable, script, "--check"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
