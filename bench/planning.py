# SPDX-License-Identifier: Apache-2.0
"""Planning of a checkpoint with very many tensors: 61 layers of 256 experts of three matrices, as DeepSeek-V3's, tiny.

    python bench/planning.py SCRATCH            builds the family once; seconds and peak memory of a plan and a merge
    python bench/planning.py SCRATCH --profile  where a plan's time goes

Each measurement is a process of its own: memory is that of a plan from a cold start.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from darekit.checkpoints import OutputTensor, index_json, lay_out

LAYERS, EXPERTS, WIDTH, INNER, TOKENS = 61, 256, 16, 8, 64
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MODELS = ("m1", "m2", "m3")
SHARDS = 16
RUNS = 3

PLAN = """
import json, sys, time
began = time.perf_counter()
from darekit.machine import peak_rss
from darekit.planning import checks
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe
recipe = read_recipe(sys.argv[1])
with open_plan(recipe) as plan:
    planned, cpu = time.perf_counter(), time.process_time()
    memory = peak_rss()
    checks.check(plan)
    print(json.dumps({"plan": planned - began, "cpu": cpu, "check": time.perf_counter() - planned, "rss": memory / 1e6,
                      "rss checked": peak_rss() / 1e6, "tensors": len(plan.alignment.tensors)}))
"""

MERGE = """
import json, sys, time
began = time.perf_counter()
import darekit as dk
from darekit.machine import peak_rss
dk.merge(sys.argv[1], sys.argv[2], overwrite=True)
print(json.dumps({"merge": time.perf_counter() - began, "rss": peak_rss() / 1e6}))
"""


def tensors() -> list[OutputTensor]:
    """47,000 of them; the expert bias in F32, all else in BF16."""
    found = [OutputTensor("model.embed_tokens.weight", "BF16", (TOKENS, WIDTH))]
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        found += [OutputTensor(f"{at}.{name}.weight", "BF16", (WIDTH,)) for name in NORMS]
        found += [OutputTensor(f"{at}.self_attn.{name}.weight", "BF16", (WIDTH, WIDTH)) for name in ATTENTION]
        found.append(OutputTensor(f"{at}.mlp.gate.weight", "BF16", (EXPERTS, WIDTH)))
        found.append(OutputTensor(f"{at}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)))
        for k in range(EXPERTS):
            expert = f"{at}.mlp.experts.{k}"
            found += [OutputTensor(f"{expert}.{name}_proj.weight", "BF16", (INNER, WIDTH)) for name in ("gate", "up")]
            found.append(OutputTensor(f"{expert}.down_proj.weight", "BF16", (WIDTH, INNER)))
    found.append(OutputTensor("model.norm.weight", "BF16", (WIDTH,)))
    found.append(OutputTensor("lm_head.weight", "BF16", (TOKENS, WIDTH)))
    return found


def build(folder: Path) -> None:
    """Write base, m1, m2 and m3 below `folder`, unless they are there; and a recipe."""
    if (folder / "recipe.yaml").exists():
        return
    wanted = tensors()
    nbytes = sum(np.prod(t.shape) * (4 if t.dtype == "F32" else 2) for t in wanted)
    shards = lay_out(wanted, int(nbytes) // SHARDS)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH, "n_routed_experts": EXPERTS, "vocab_size": TOKENS, "torch_dtype": "bfloat16",
    }  # fmt: skip
    for number, name in enumerate(("base", *MODELS)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "model.safetensors.index.json").write_text(index_json(shards))
        for shard in shards:
            with (folder / name / shard.filename).open("wb") as file:
                file.write(shard.header)
                for place in shard.placements:
                    file.write(values(place.name, place.dtype, place.nbytes, number))
    recipe = {
        "base_model": str(folder / "base"), "merge_method": "dare_ties", "dtype": "bfloat16",
        "models": [{"model": str(folder / name), "parameters": {"density": 0.5, "weight": 1.0}} for name in MODELS],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def values(name: str, dtype: str, nbytes: int, number: int) -> bytes:
    """A tensor of the base (number 0) or of a model: the base's values, each moved by half a percent of its size."""
    import zlib

    size = nbytes // (4 if dtype == "F32" else 2)
    found = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(size, np.float32)
    if number:
        found *= 1 + 0.005 * np.random.default_rng([number, size]).standard_normal(size, np.float32)
    return found.tobytes() if dtype == "F32" else (found.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def measured(script: str, *arguments: str) -> dict[str, float]:
    """The best of a few runs, each in a process of its own."""
    runs = []
    for _ in range(RUNS):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        runs.append(json.loads(done.stdout))
    return {key: min(run[key] for run in runs) for key in runs[0]}


def profile(recipe: str) -> None:
    import cProfile
    import pstats

    from darekit.planning.opening import open_plan
    from darekit.recipe import read_recipe

    found, profiler = read_recipe(recipe), cProfile.Profile()
    profiler.enable()
    with open_plan(found):
        profiler.disable()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    folder = options.scratch.absolute() / "many"
    build(folder)
    recipe = str(folder / "recipe.yaml")
    if options.profile:
        profile(recipe)
        return
    plan = measured(PLAN, recipe)
    whole = measured(MERGE, recipe, str(folder / "out"))
    shutil.rmtree(folder / "out")
    print(
        f"{plan['tensors']} tensors: plan {plan['plan']:.1f} s ({plan['cpu']:.1f} s of a processor) and "
        f"{plan['rss']:.0f} MB, check {plan['check']:.1f} s, merge {whole['merge']:.1f} s and {whole['rss']:.0f} MB"
    )


if __name__ == "__main__":
    main()
