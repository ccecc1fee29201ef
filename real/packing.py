# SPDX-License-Identifier: Apache-2.0
"""One model as files: packs, what magnitude leaves, and adapters, with what is judged of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from real.lessons import PROSE
from real.sizes import Size, Step

PACKS: Mapping[str, tuple[str, ...]] = {
    "lossless": ("--lossless",),
    "16 bit, p = .9": ("-p", "0.9", "--bits", "16"),
    "4 bit, p = .9": ("-p", "0.9", "--bits", "4"),
    "4 bit, p = .95": ("-p", "0.95", "--bits", "4"),
    "4 bit, p = .99": ("-p", "0.99", "--bits", "4"),
    "1 bit, p = .9": ("-p", "0.9", "--bits", "1"),
    "4 bit, p = .95, embeddings and norms kept": (
        "-p", "0.95", "--bits", "4", "--keep-dense", "embeddings", "--keep-dense", "norms",
    ),
    "1 bit, nothing dropped (BitDelta)": ("-p", "0", "--bits", "1", "--dense-bits", "1", "--group", "65536"),
}  # fmt: skip
MAGNITUDE = {f"magnitude, p = {rate:g}".replace("0.", "."): rate for rate in (0.9, 0.95, 0.99)}


RANKS = (4, 8, 32, 128)
LORAS: Mapping[str, tuple[str, ...]] = {
    **{f"LoRA, rank {rank}": ("--rank", f"{rank}") for rank in RANKS},
    "LoRA, energy .9": ("--energy", "0.9"),
}
ENERGY_SECONDS = 120.0  # all singular values of every matrix; ranks take a few seconds


def pack_path(model: str, title: str) -> str:
    """Where a pack is written.

    >>> pack_path("json", "4 bit, p = .9")
    'packs/json/4-bit-p-.9.pack.safetensors'
    """
    words = "".join(c if c.isalnum() or c == "." else " " for c in title).split()
    return f"packs/{model}/{'-'.join(words)}.pack.safetensors"


def pack_steps(size: Size, one: str) -> Iterator[Step]:
    """Packs of one model, and what is judged of them."""
    quick = len(size.abilities) == 1
    kept = [title for title in PACKS if not quick or title in ("lossless", "4 bit, p = .95")]
    pruned = {} if quick else MAGNITUDE
    for title in kept:
        path = pack_path(one, title)
        words = ("pack", "base", one, path, *PACKS[title], "--force", "--overwrite", "--json")
        yield Step(f"pack-{one}-{title}", f"pack of {one}: {title}", words, seconds=6, makes=path, needs=(one,))
    for title, rate in pruned.items():
        # What is left of magnitude pruning, as a file: positions and values, without loss.
        folder, path = f"packs/{one}/pruned-{rate:g}", pack_path(one, title)
        words = (
            "drop", "base", one, folder, "--method", "magnitude", "-p", f"{rate:g}", "--rescale", "none", "--force",
            "--overwrite", "--json",
        )  # fmt: skip
        title_ = f"pruned {one}, p = {rate:g}"
        yield Step(f"prune-{one}-{rate:g}", title_, words, seconds=6, makes=folder, needs=(one,))
        words = ("pack", "base", folder, path, "--lossless", "--overwrite", "--json")
        yield Step(f"pack-{one}-{title}", f"pack of {one}: {title}", words, seconds=8, makes=path, needs=(one,))
    files = [pack_path(one, title) for title in (*kept, *pruned)]
    words = (
        "eval", *files, "--base", "base", "--data", f"data/{one}.test.jsonl", "--data", f"data/{PROSE}.test.jsonl",
        "--batch-size", f"{size.batch}", "--out", f"runs/packs-{one}", "--json",
    )  # fmt: skip
    cells = ((len(files), (one, PROSE)),)
    title = f"packs of {one}, judged"
    yield Step(f"packs-{one}", title, words, cells=cells, device=True, seconds=20, needs=(one,))


def lora_path(model: str, title: str) -> str:
    """Where an adapter is written.

    >>> lora_path("json", "LoRA, rank 8")
    'adapters/json/rank-8'
    """
    return f"adapters/{model}/{title.partition(', ')[2].replace(' ', '-')}"


def lora_steps(size: Size, one: str) -> Iterator[Step]:
    """The delta of one model as adapters, and what is judged of them: beside the lossless pack, which is the model
    itself and was judged with the packs."""
    whole = "loras" in size.also
    titles = [title for title in LORAS if whole or title != "LoRA, energy .9"]
    for title in titles:
        path = lora_path(one, title)
        words = ("extract", "base", one, path, *LORAS[title], "--dtype", "bfloat16", "--force", "--overwrite", "--json")
        seconds = ENERGY_SECONDS if "energy" in title else 20.0
        yield Step(f"lora-{one}-{title}", f"{one} as {title}", words, seconds=seconds, makes=path, needs=(one,))
    adapters = [f"base+{lora_path(one, title)}" for title in titles]
    words = (
        "eval", pack_path(one, "lossless"), *adapters, "--base", "base", "--data", f"data/{one}.test.jsonl", "--data",
        f"data/{PROSE}.test.jsonl", "--batch-size", f"{size.batch}", "--out", f"runs/packs-{one}", "--json",
    )  # fmt: skip
    cells = ((len(titles), (one, PROSE)),)
    title = f"adapters of {one}, judged"
    yield Step(f"loras-{one}", title, words, cells=cells, device=True, seconds=20, needs=(one,))
