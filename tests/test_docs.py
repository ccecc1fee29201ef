# SPDX-License-Identifier: Apache-2.0
"""The documents tell the truth: examples run, links lead somewhere, options exist, generated pages are current.

The line before a code block says what happens to it here:

- `<!-- run -->`: each line of shell, or the whole block of Python, runs;
- `<!-- run: name.yaml -->`: it is saved under that name, and a YAML file is read as a recipe;
- `<!-- save: name.yaml -->`: it is saved under that name;
- `<!-- run in sh -->`: the whole block runs as one script of the shell;
- `<!-- run on the Hub -->`: each line runs in a process of its own, with the stand-in of `hub_server` as the Hub;
- `<!-- output -->`: it shows what a command before it printed: the numbers may differ.

The examples of one document run in order in one folder, which looks like `demo/` after `make demo`. Every `dare` line
in any block must run, except those in NOT_RUN, which are parsed.
"""

import ast
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer

import conftest
import families
import packs as bench_packs
import run as bench
from darekit import cli
from darekit.checkpoints import ArrayBytes, Checkpoint, TensorInfo, sample_digest
from darekit.checkpoints.digests import TensorDigest, checkpoint_digest, tensor_digest
from darekit.cli import mergekit_options
from darekit.masks import draws, effective_seeds, kept, stream_of, threshold_of
from darekit.recipe import read_recipe
from hub_server import TOKEN, Hub

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(
    r"(?:<!-- (?P<marker>run|run in sh|run on the Hub|save|output)(?:: (?P<file>\S+))? -->\n)?"
    r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
RUN = ("run", "run in sh", "run on the Hub")
OTHERS_FLAGS = {
    "--also",  # of `python -m real`; the others are mergekit's
    *mergekit_options.SAME, *mergekit_options.SWITCHES, *mergekit_options.VALUES,
    mergekit_options.CACHE, mergekit_options.OUT_PATH, mergekit_options.TRUNCATE,
}  # fmt: skip
# Where a command can begin: a line, a prompt, after another command, after variables.
DARE_LINE = re.compile(r"^(?:.*?(?:&&|[;|$(])[ \t]*)?[ \t]*(?:\w+=\S*[ \t]+)*(?:\S*/)?(dare[ \t].*)$", re.M)

# Lines that no test can run, and why. They are parsed by the command itself.
DOWNLOADS = "lm-eval fetches this task's questions from the Hub"
NOT_RUN = {
    "dare --help": "exits by itself; test_cli.py and test_imports.py run it",
    "dare demo": "trains for minutes; test_demo.py runs a smaller one",
    "dare eval wizardmath-13b merge.yaml --tasks gsm8k,MATH --batch-size 16 --out results": DOWNLOADS,
    "dare eval merge.yaml --tasks humaneval,mbpp": DOWNLOADS,
    "dare search on-ray.yaml --ray": "starts a cluster; test_clusters.py does",
    "dare search on-ray.yaml --ray head:6379 --jobs 8": "needs a cluster; test_clusters.py has one of its own",
}
NOT_RUN_PAGES = {
    "docs/paper/README.md": "`make paper` runs them in 25 CPU minutes and writes the page",
    "docs/real/README.md": "`make real` runs them in an hour and writes the page",
}


def blocks(document):
    """(kind, text, file to save it as, "run" or "output" or None) of every fenced block."""
    for match in FENCE.finditer(document.read_text(encoding="utf-8")):
        yield match["kind"], match["text"], match["file"], match["marker"]


def name_of(path):
    return str(path.relative_to(ROOT))


def shape(line):
    """A line without its numbers, their units and its spacing."""
    return " ".join(re.sub(r"\d[\d.]*( [kMGT]?B?\b)?", "#", line).split())


RUNNABLE = [path for path in DOCUMENTS if any(marker in RUN for *_, marker in blocks(path))]


def dare_lines(document):
    """(line without comment, whether it runs) of every `dare` line in a code block."""
    for _, text, _, marker in blocks(document):
        for line in DARE_LINE.findall(text):
            yield shlex.join(shlex.split(line, comments=True)), marker in RUN


@functools.cache
def whole_command():
    return typer.main.get_command(cli.build_app())


def command_of(words):
    """The command that these words name, and the words that are left."""
    command, words = whole_command(), list(words)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    return command, words


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


@pytest.fixture
def processes(family, tmp_path):
    """What a process of an example sees: `dare` and `python` on its path, and a Hub with a base and two models."""
    hub = Hub()
    for name, source in (("org/base", "base"), ("org/math", "reverse"), ("org/code", "sort")):
        hub.repositories[name] = {file.name: file.read_bytes() for file in (family / source).iterdir()}
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, module in (("dare", "-m darekit"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        (programs / name).chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*",
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip

    def run(script, folder):
        """Standard output and error of a script of the shell, which must succeed."""
        script = script.replace("@COMMIT", f"@{hub.commit('org/base')}").replace("@v1", f"@{hub.commit('org/code')}")
        done = subprocess.run(
            ["sh", "-e", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    yield SimpleNamespace(run=run, programs=programs, hub=hub)
    hub.close()


@pytest.mark.parametrize("document", RUNNABLE, ids=name_of)
def test_the_examples_run(document, family, processes, tmp_path, monkeypatch, dare):
    folder = tmp_path / "demo"
    shutil.copytree(family, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(processes.programs), prepend=os.pathsep)
    said = set()
    for kind, text, file, marker in blocks(document):
        if marker == "output":
            for line in text.splitlines():
                assert shape(line) in said, f"{name_of(document)} shows what nothing says: {line}"
        elif marker is None:
            continue
        elif file is not None:
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).write_text(text)
            if kind == "yaml" and marker == "run":
                read_recipe(file)
        elif kind == "python":
            if "safetensors.torch" in text:
                pytest.importorskip("safetensors.torch")
            exec(compile(text, name_of(document), "exec"), {"__name__": "example"})
        elif marker == "run in sh":
            said |= {shape(line) for line in processes.run(text, folder).splitlines()}
        elif marker == "run on the Hub":
            for line in text.splitlines():
                said |= {shape(line) for line in processes.run(line, folder).splitlines()}
        else:
            for line in text.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                if program == "dare":
                    done = dare(*arguments)
                    assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
                    said |= {shape(line) for line in (done.out + done.err).splitlines()}
                else:
                    subprocess.run([program, *arguments], check=True)


def test_the_first_merge_runs_on_hub_models(processes, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [script] = [block for _, block, _, marker in blocks(ROOT / "README.md") if marker == "run in sh"]
    [names] = re.findall(r"`(BASE=org/\S+ ONE=\S+ TWO=\S+@v1)`", text)
    _, rest = script.split("\n", 1)
    assert len(script.splitlines()) == 10 and "run in sh" in text
    assert "first: " in processes.run(f"{names}\n{rest}", tmp_path)
    assert {"README.md", "config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "first").iterdir()}


def not_run(document):
    """The `dare` lines of a document that nothing runs."""
    return [line for line, runs in dare_lines(document) if not runs and line not in NOT_RUN]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_dare_line_runs_or_is_known_not_to(document):
    if name_of(document) not in NOT_RUN_PAGES:
        assert not_run(document) == [], f"mark their blocks in {name_of(document)} so that they run"


def test_a_dare_line_that_nothing_runs_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    for fence in ("```sh", "```console", "```"):
        for before in (
            "",
            "  ",
            "$ ",
            ".venv/bin/",
            "HF_HUB_OFFLINE=1 ",
            "cd demo && ",
            "yes | ",
            "true; A=b C=d bin/",
        ):
            line = f"{before}dare merge a.yaml b  # comment"
            page.write_text(f"text\n\n{fence}\n{line}\n```\n")
            assert not_run(page) == ["dare merge a.yaml b"], line
    page.write_text("<!-- run -->\n```sh\ndare merge a.yaml b\n```\n")
    assert not_run(page) == [] and list(dare_lines(page)) == [("dare merge a.yaml b", True)]


def test_what_is_known_not_to_run_is_in_a_document_and_parses():
    shown = {line for document in DOCUMENTS for line, runs in dare_lines(document) if not runs}
    assert NOT_RUN.keys() <= shown
    written = {name: {line for line, _ in dare_lines(ROOT / name)} for name in NOT_RUN_PAGES}
    assert min(map(len, written.values())) > 8
    for line in NOT_RUN.keys() - {"dare --help"} | {line for lines in written.values() for line in lines}:
        command, words = command_of(cli.spelled_out(shlex.split(line)[1:]))
        command.make_context(line, words)  # raises a usage error, which names what it does not understand


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_named_in_the_text_exist(document):
    for span in re.findall(r"`dare ([a-z][^`\n]*)`", document.read_text(encoding="utf-8")):
        command, words = command_of(shlex.split(span))
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        for word in words:
            assert not word.startswith("-") or word in known, f"{name_of(document)}: `dare {span}` has no {word}"


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
    assert module.stale()[:3] == ["methods.md", "cli.md", "commands/merge.md"] and module.main() == 1
    monkeypatch.setattr("sys.argv", ["generate.py"])
    assert module.main() == 0 and module.stale() == []
    (tmp_path / "cli.md").write_text("old")
    (tmp_path / "commands" / "gone.md").write_text("a command that was removed")
    assert module.stale() == ["cli.md", "commands/gone.md"]
    assert module.main() == 0 and module.stale() == [] and not (tmp_path / "commands" / "gone.md").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert (document.parent / target.split("#")[0]).exists(), f"{name_of(document)} links to {target}"


def defined_in(path):
    """Functions and classes of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("way", ["One tensor, from disk to disk", "The same tensor", "A candidate of a search"])
def test_a_way_through_the_house_is_five_files_with_what_they_are_said_to_define(way):
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").replace("\\", "")
    (way,) = re.findall(rf"^## {way}(.*?)(?=^## )", text, re.M | re.S)
    stops = re.findall(r"^\d\. \[[^]]+\]\(\.\./([^)]+)\)(.*?)(?=^\d\. |\n\n)", way, re.M | re.S)
    assert len({path for path, _ in stops}) == len(stops) == 5
    anywhere = set().union(*(defined_in(path) for path in (ROOT / "src").rglob("*.py")))
    anywhere |= {"trim", "PAIR", "ALONE", "OPENERS"}
    for path, said in stops:
        names = [part for name in re.findall(r"`([A-Za-z_][\w.]*)`", said) for part in name.split(".")
                 if not name.endswith(".py")]  # fmt: skip
        assert names and names[0] in defined_in(ROOT / path), f"{path} does not define {names[0]}"
        assert not set(names) - anywhere, f"architecture.md, at {path}: nothing is called {set(names) - anywhere}"


def test_the_architecture_names_files_that_exist():
    files = [f"/{path.relative_to(ROOT)}" for path in (ROOT / "src").rglob("*.py")] + ["/tests/test_imports.py"]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").replace("\\", "")
    named = set(re.findall(r"(?<![\w/])[a-z_]+(?:/[a-z_]+)*\.py\b", text))
    assert {"planning/steps.py", "engine/tiles.py"} <= named
    for name in named:
        assert any(path.endswith(f"/{name}") for path in files), name


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for document in DOCUMENTS:
        for target in re.findall(r"`(?:[A-Z]+=\S+ )?make (\w+)`", document.read_text(encoding="utf-8")):
            assert target in targets, f"{name_of(document)} names make {target}"
    assert {"demo", "test"} <= targets


def test_options_that_are_named_exist():
    known = (
        set(re.findall(r"`(--?[a-z][a-z-]*)`", "".join(page() for page in generator().pages().values())))
        | {"--help", "--version"}
        | OTHERS_FLAGS
    )
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        spans = [*re.findall(r"`([^`\n]*)`", text), *(block for kind, block, *_ in blocks(document) if kind == "sh")]
        for span in spans:
            if re.search(r"\.py|pip |git |hf |ruff|pytest|vllm |BENCH=", span):  # another program's options
                continue
            for flag in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", span):
                assert flag in known, f"{name_of(document)} names {flag}"


def test_documents_name_no_machine():
    for document in [*DOCUMENTS, ROOT / "CITATION.cff"]:
        text = document.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text), name_of(document)


# --- docs/formats.md: its known answers are the code's


FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
SENTENCES = " ".join(FORMATS.split())


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
        assert f"element 2^34 + {offset} draws `{word}`" in SENTENCES
        assert draws(0, stream_of("w"), 2**34 + offset, 1)[0] == int(word, 16)
    assert f"The threshold of p = 0.9 is {threshold_of(0.9)}." in SENTENCES
    zeros = bytes(16)
    for number in (*effective_seeds(42, [bytes(range(16)), zeros]), *effective_seeds(42, [zeros, zeros])):
        assert str(number) in SENTENCES


def test_known_answers_of_the_digests():
    raws = {"w": np.arange(12, dtype="<f4").view(np.uint8), "b": np.array([0, 0, 0x80, 0x3F], np.uint8)}
    headers = {"w": ("F32", (3, 4), 4), "b": ("BF16", (2,), 2)}
    infos, rows = {}, []
    for name, (dtype, shape, size) in headers.items():
        infos[name] = TensorInfo(name, dtype, shape, ArrayBytes(raws[name]))
        digest = TensorDigest(size)
        digest.update(raws[name])
        rows.append((name, dtype, shape, tensor_digest(digest.finish())))
        assert f"`{name}` `{rows[-1][-1]}`" in SENTENCES
    checkpoint = Checkpoint(ref="x", directory=None, tensors=infos, config=None, files=(), revision=None)
    assert f"`{sample_digest(checkpoint).hex()}`" in SENTENCES
    assert f"the checkpoint `{checkpoint_digest(rows)}`" in SENTENCES


def test_the_readme_cites_what_the_cards_cite():
    from darekit.output.card import CITATION

    for page in (ROOT / "README.md", ROOT / "docs" / "citing.md"):
        assert f"```bibtex\n{CITATION}```" in page.read_text(encoding="utf-8")


def test_the_readme_fits_on_few_screens():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 110 and not line.startswith("|")] == []


def test_the_readme_lists_commands_that_exist_and_leads_to_all():
    """A new command need not be in it: the generated docs/cli.md has all."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Commands") : text.index("## Compared")]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = re.findall(r"`(?:dare )?([a-z]+)`", " ".join(cells))
    assert len(named) > 20 and len({*named}) == len(named) and {*named} <= {*cli.COMMANDS}
    assert "[docs/cli.md](docs/cli.md)" in table


def test_the_readme_takes_its_numbers_from_the_pages_that_it_links_to():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = {
        "docs/speed.md": text[text.index("- **Fast") : text.index("- **Takes")],
        "docs/real/README.md": text[text.index("| exact match") : text.index("- **Fast")],
        "docs/demo.md": text[text.index("[In the demo]") : text.index("A merge promises")],
    }
    for page, part in parts.items():
        assert page in part
        there = re.findall(r"\d[\d.]*\d|\d", (ROOT / page).read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-"))
        for number in re.findall(r"(?<![\w.])\d[\d.]*\d|(?<![\w.])\d(?![\w.])", part):
            assert number in there, f"README has {number}, which is not on {page}"
    page = (ROOT / "docs" / "real" / "README.md").read_text(encoding="utf-8")
    rows = [row for row in parts["docs/real/README.md"].splitlines() if row.startswith("|")]
    assert len(rows) >= 6 and [row for row in rows if row not in page.splitlines()] == []


def test_what_is_said_of_the_speeds_is_what_the_table_says():
    text = bench.PAGE.read_text(encoding="utf-8")
    table = text[text.index("<!-- bench:begin") : text.index("<!-- bench:end")]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    places = {name: place for place, name in enumerate(rows[0])}
    mergekit, disk = places["mergekit s"], places["and on the disk s"]
    waited = [f"{float(row[mergekit]) / float(row[disk]):.0f}" for row in rows[2:5]]
    assert f"mergekit takes {waited[0]}, {waited[1]} and {waited[2]} times as long" in " ".join(text.split())
    ratios = [int(row[places["mergekit / darekit"]].rstrip("x")) for row in rows[2:] if row[mergekit]]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert len(ratios) == 10 and f"Over ten recipes it takes {min(ratios)} to {max(ratios)} times as long" in readme


def test_measurements_find_their_places(tmp_path):
    for page, parts in ((bench.PAGE, ("bench", "adapters")), (bench_packs.PAGE, ("sizes", "speeds", "gpu"))):
        text = page.read_text(encoding="utf-8")
        for part in parts:
            begin, end = f"<!-- {part}:begin -->\n", f"\n<!-- {part}:end -->"
            assert text.count(begin) == text.count(end) == 1
            copy = tmp_path / page.name
            copy.write_text(text, encoding="utf-8")
            bench.put("a new table", copy, part)
            expected = text[: text.index(begin)] + f"{begin}a new table{end}" + text[text.index(end) + len(end) :]
            assert copy.read_text(encoding="utf-8") == expected


def test_the_check_of_the_generator_is_a_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    script = str(ROOT / "docs" / "generate.py")
    done = subprocess.run(
        [sys.executable, script, "--check"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
