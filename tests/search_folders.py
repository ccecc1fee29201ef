# SPDX-License-Identifier: Apache-2.0
"""Folders as docs/search.md describes them, made of random numbers: what a page of a search is tested with."""

import json

import numpy as np

SPACE = {
    "merge_method": {"choices": ["task_arithmetic", "ties", "linear"]},
    "parameters.lambda": {"low": 0.2, "high": 2.0, "log": False, "step": None},
    "sparsify.drop_rate": {"low": 0.0, "high": 0.9, "log": False, "step": None},
    "parameters.eps": {"low": 1e-4, "high": 1.0, "log": True, "step": None},
    **{f"models.0.parameters.weight[{i}]": {"low": 0.0, "high": 2.0, "log": False, "step": None} for i in range(4)},
    **{f"models.1.parameters.weight[{g}]": {"low": 0.0, "high": 2.0, "log": False, "step": None}
       for g in ("attention", "mlp")},
}  # fmt: skip
SHARES = (1 / 9, 1 / 3, 1.0)


def score(value, items, higher=True):
    error = (abs(value * (1 - value)) / max(1, items)) ** 0.5
    return {"value": float(value), "stderr": float(error), "higher_is_better": higher, "items": items}


def recipe(params):
    method = params.get("merge_method", "task_arithmetic")
    weights = [params.get(f"models.0.parameters.weight[{i}]", 1.0) for i in range(4)]
    return {
        "base_model": "base",
        "models": [{"model": "math", "parameters": {"weight": weights}}, {"model": "chat", "parameters": {}}],
        "sparsify": {"method": "dare", "drop_rate": params.get("sparsify.drop_rate", 0.0), "on": "delta", "seed": 0,
                     "keep_dense": []},
        "merge_method": method,
        "parameters": {"lambda": params.get("parameters.lambda", 1.0)} if method != "linear" else {},
        "vocab": "strict",
    }  # fmt: skip


def trial(number, rng, goals, items=270):
    params = {}
    for name, one in SPACE.items():
        if "choices" in one:
            params[name] = str(rng.choice(one["choices"]))
        elif one["log"]:
            params[name] = float(np.exp(rng.uniform(np.log(one["low"]), np.log(one["high"]))))
        else:
            params[name] = float(rng.uniform(one["low"], one["high"]))
    truth = 0.7 - 0.3 * (params["parameters.lambda"] - 1.1) ** 2 + 0.1 * (params["merge_method"] == "ties")
    state = "complete" if truth > 0.62 or number % 7 == 0 else "stopped"
    reached = SHARES if state == "complete" else SHARES[: 1 + number % 2]
    rungs = []
    for share in reached:
        values = {
            goal: score(np.clip(truth * (1 if i == 0 else 0.8) + rng.normal(0, 0.03), 0, 1), round(items * share))
            for i, goal in enumerate(goals)
        }
        gaps = {goal: {"value": values[goal]["value"] - 0.7, "stderr": 0.05 / share**0.5} for goal in goals}
        rungs.append({"share": share, "items": round(items * share), "scores": values, "against": 0,
                      "differences": gaps})  # fmt: skip
    return {
        "kind": "trial", "trial": number, "name": None, "state": state, "params": params, "recipe": recipe(params),
        "rungs": rungs, "scores": rungs[-1]["scores"], "feasible": None, "items": rungs[-1]["items"],
        "digest": f"{number:032x}", "seconds": 1.5, "error": None, "warnings": [],
    }  # fmt: skip


def baseline(name, value, goals):
    scores = {goal: score(value, 270) for goal in goals}
    return {
        "kind": "baseline", "trial": None, "name": name, "state": "complete", "params": {}, "recipe": recipe({}),
        "rungs": [], "scores": scores, "feasible": None, "items": 270, "digest": f"{hash(name) & 255:032x}",
        "seconds": 1.0, "error": None, "warnings": [],
    }  # fmt: skip


def write_search(folder, count=300, goals=("mean",), seed=0, finished=True, change=lambda trials: None):
    """A folder of `dare search`; `change` may spoil its lines before they are written."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"base": 0.1, "single math": 0.55, "single chat": 0.5, "average": 0.52, "task arithmetic": 0.6}
    lines = [baseline(name, value, goals) for name, value in names.items()]
    lines += [trial(number, rng, goals) for number in range(count)]
    change(lines)
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    question = {
        "recipe": recipe({}), "space": SPACE, "goals": [{"score": goal, "higher_is_better": True} for goal in goals],
        "constraints": [], "sampler": "tpe", "seed": 0, "rungs": list(SHARES), "validation": ["math", "chat"],
        "test": ["math", "chat"],
    }  # fmt: skip
    (folder / "search.json").write_text(json.dumps({"format": "darekit-search-1", "name": "abilities", **question}))
    if not finished:
        return folder
    complete = [
        line for line in lines
        if line["kind"] == "trial" and line["state"] == "complete" and line["scores"][goals[0]]["value"] is not None
    ]  # fmt: skip
    best = max(complete, key=lambda line: line["scores"][goals[0]]["value"], default=None)
    chosen = None
    if best is not None:
        test = {goal: score(best["scores"][goal]["value"] - 0.01, 270) for goal in goals}
        chosen = {"trial": best["trial"], "params": best["params"], "recipe": best["recipe"],
                  "validation": best["scores"], "test": test}  # fmt: skip
    front = [] if len(goals) < 2 else [
        {"trial": one["trial"], "params": one["params"], "recipe": one["recipe"], "validation": one["scores"]}
        for one in complete
        if not any(all(two["scores"][g]["value"] >= one["scores"][g]["value"] for g in goals) and two is not one
                   for two in complete)
    ]  # fmt: skip
    summary = {
        "format": "darekit-search-1", "name": "abilities", "question": question,
        "counts": {"trials": count, "complete": len(complete), "stopped": count - len(complete), "failed": 0,
                   "reused": 0, "items": 30000, "items_without_rungs": 81000, "saved": 0.63},
        "baselines": [
            {"name": line["name"], "recipe": line["recipe"], "validation": line["scores"],
             "test": line["scores"], "error": None}
            for line in lines if line["kind"] == "baseline"
        ],
        "best": chosen, "front": front, "hypervolume": 0.41 if front else None,
        "best_single": "single math", "best_plain": "task arithmetic",
        "differences": [
            {"against": name, "role": role, "score": goals[0], "split": "test", "value": 0.12, "stderr": 0.03,
             "interval": [0.06, 0.18], "better": True}
            for name, role in (("single math", "best_single"), ("task arithmetic", "best_plain"))
        ],
        "verdict": ["The best recipe is better than the best single model and the best plain merge, on test.",
                    "mean 0.80 against 0.55 and 0.60."],
        "test_looks": 1, "notes": ["parameters.eps hardly varied"], "seconds": 412.0,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
