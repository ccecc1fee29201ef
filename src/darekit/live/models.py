# SPDX-License-Identifier: Apache-2.0
"""Models in torch's memory: opened from a checkpoint or a plan, and their weights replaced through the engine.

The engine writes its tiles straight into the live model's tensors: no checkpoint is written, and besides the model
there are only a few tiles in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darekit.architectures.families import facts_of
from darekit.architectures.layout import Part, Unplaced, places_of
from darekit.errors import DataError, Unsupported
from darekit.live.loading import Destinations, destinations, put, refuse_misfits, settle, state_of
from darekit.live.skeletons import skeleton
from darekit.live.tasks import FUNCTION, kind_of, task_of
from darekit.planning.opening import open_plan
from darekit.planning.plan import Plan
from darekit.recipe import Recipe, read_recipe


@dataclass
class LiveModel:
    """A model that runs.

    Attributes:
        model: the torch module, in evaluation mode.
        tokenizer: its tokenizer, None where there is none.
        task: causal, classifier, regressor, encoder-decoder, masked or other (`darekit.live.tasks`).
        device: where it computes.
        config: the content of its config.json.
    """

    model: Any
    tokenizer: Any
    task: str
    device: Any
    config: Mapping[str, Any]

    @property
    def max_length(self) -> int:
        """Tokens that one example may have, by its config and its tokenizer."""
        config = self.model.config.get_text_config() if hasattr(self.model.config, "get_text_config") else None
        found = [getattr(self.tokenizer, "model_max_length", None)]
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            found.append(next((getattr(c, name, None) for c in (self.model.config, config) if hasattr(c, name)), None))
        limits = [int(one) for one in found if isinstance(one, int | float) and 0 < one < 1 << 30]
        return min(limits, default=2048)

    @property
    def kind(self) -> str:
        """The class and what it is, for messages."""
        return kind_of(self.model)

    @property
    def suspects(self) -> str:
        """Why something that it computes may be NaN or infinite, and what to do, for messages."""
        import torch

        used = {one.dtype for one in self.model.parameters() if one.is_floating_point()}
        if used & {torch.float16, torch.bfloat16}:
            return "its weights are broken, or too large for the 16 bits that it computes in: try --dtype float32"
        return "its weights are broken, or overflow even in float32"

    def put(self, plan: Plan, *, threads: int | None = None) -> None:
        """Replace the weights by those that the plan makes, to the bit that transformers would load from a merge.

        The plan's checkpoints must be open, and its output must have this model's shapes.

        Raises:
            HomologyError: the output has other tensors than this model.
            DataError: NaN, Inf, an overflow, or a damaged pack; the weights are undefined then.
        """
        self._put(plan, threads)

    def _put(self, plan: Plan, threads: int | None = None) -> Destinations:
        shapes = {place.name: tuple(place.shape) for shard in plan.shards for place in shard.placements}
        found = destinations(self.model, shapes)
        refuse_misfits(self.model, found, shapes, self.config)
        records = put(self.model, plan, found, threads=threads)
        plan.refuse_damaged(records, "the model in memory is unusable now (reload it)")
        return found

    def run(self, inputs: Mapping[str, Any], *, body: Any = None, **more: Any) -> Any:
        """The model's output for these arguments (`body`: that of a part of it).

        Raises:
            DataError: the model raises something, such as for an input that it lacks.
        """
        try:
            return (self.model if body is None else body)(**inputs, **more)
        except Exception as error:
            if type(error).__module__.startswith("darekit") or memory_is_out(error):
                raise
            said = next((line for line in str(error).splitlines() if line.strip()), "no further details")
            who, given = type(self.model).__name__, ", ".join(inputs)
            raise DataError(
                f"{who} cannot be run on {given} alone ({said[:200]}). It can be judged by {FUNCTION}"
            ) from error

    def tensors(self, names: Iterable[str]) -> dict[str, Any]:
        """Names in the checkpoint -> live tensors, each under its first name; names of nothing here are left out, and
        of what is another tensor in memory."""
        state = state_of(self.model)
        found: dict[str, Any] = {}
        seen = set()
        shapes = {name: () for name in names}
        direct = destinations(self.model, shapes, rehearse=False).direct
        for name in shapes:
            if name in direct and (tensor := state[direct[name]]).data_ptr() not in seen:
                found[name] = tensor
                seen.add(tensor.data_ptr())
        return found

    def parts(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[Any, Part], ...]]:
        """Names in the checkpoint -> the live tensors that hold them, and the way to what is theirs: also of experts
        that are stored one by one and fused in memory. What is permuted there is left out; ties as in `tensors`."""
        state = state_of(self.model)
        whole = self.tensors(shapes)
        found: dict[str, tuple[tuple[Any, Part], ...]] = {name: ((t, Part("")),) for name, t in whole.items()}
        config = {"architectures": [type(self.model).__name__], "model_type": self.model.config.model_type}
        places = places_of(shapes, {name: tuple(t.shape) for name, t in state.items()}, facts_of(config))
        taken = {id(tensor) for tensor in whole.values()}
        for name, place in places.items():
            if name not in found and not isinstance(place, Unplaced):
                parts = tuple((state[part.name], part) for part in place)
                if not any(id(tensor) in taken for tensor, _ in parts):
                    found[name] = parts
        return {name: found[name] for name in shapes if name in found}


@contextmanager
def open_live(
    source: str | Path | Recipe | Mapping[str, Any],
    *,
    search: Sequence[Path] = (),
    device: str | None = None,
    dtype: str | None = None,
) -> Iterator[LiveModel]:
    """A model directory, Hub id, recipe file, recipe or recipe's data -> a model that runs, merged in memory.

    Args:
        source: a `.yaml`/`.yml` file is a recipe; any other text names a checkpoint.
        search: where relative names of a recipe are looked up after the working directory.
        device: cpu, cuda, cuda:1, mps; the fastest there is where not given.
        dtype: what it computes in; float32 on a CPU, else the checkpoint's own.

    Raises:
        DarekitError: see `darekit.errors`.
    """
    recipe, folders = recipe_of(source)
    with open_plan(recipe, search=(*folders, *search)) as plan:
        yield build(plan, device=device, dtype=dtype)


def recipe_of(source: str | Path | Recipe | Mapping[str, Any]) -> tuple[Recipe, tuple[Path, ...]]:
    """What `open_live` takes -> the recipe (a checkpoint's: itself alone, untouched), and where its names are."""
    if isinstance(source, Recipe):
        return source, ()
    if isinstance(source, Mapping):
        return read_recipe(source), ()
    path = Path(source)
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        return read_recipe(path), (path.resolve().parent,)
    return read_recipe({"models": [{"model": str(source)}], "merge_method": "linear"}), ()


def build(plan: Plan, *, device: str | None = None, dtype: str | None = None) -> LiveModel:
    """The plan's output as a live model; the plan's checkpoints must be open.

    Raises:
        Unsupported: torch or transformers is missing, or transformers does not know the model.
        PlanError: no such device.
        DataError: out of memory.
    """
    models = [model.ref for model in plan.models]
    with memory_told(
        f"loading {models[0] if len(models) == 1 else f'the merge of {len(models)} models'}", LOADING_ADVICE
    ):
        model, tokenizer, config = skeleton(plan, device, dtype)
        live = LiveModel(model, tokenizer, task_of(model), next(model.parameters()).device, config)
        given = live._put(plan).given
        settle(model, given)
    return live


def require_torch() -> None:
    """Complain, before anything else is done, where models cannot be run.

    Raises:
        Unsupported: torch or transformers is missing.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise Unsupported(f"running a model needs {' and '.join(missing)}: pip install 'darekit[torch]'")


@contextmanager
def one_thread(device: Any) -> Iterator[None]:
    """One torch thread where the CPU computes, restored afterwards: on two shared cores a second one made small models
    3 to 13 times slower. `OMP_NUM_THREADS`, where it is set, is respected."""
    import torch

    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_is_out(error: BaseException) -> bool:
    """Whether an error of torch's means that memory is full."""
    import torch

    known = ("not enough memory", "out of memory", "can't allocate memory")  # Windows, CUDA, Linux
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in known)


LOADING_ADVICE = "use --dtype bfloat16, which takes half of float32's memory, or another --device"
BATCH_ADVICE = "use a smaller --batch-size or --max-length, --dtype bfloat16, or --device cpu"


@contextmanager
def memory_told(what: str, advice: str = BATCH_ADVICE) -> Iterator[None]:
    """Out of memory becomes an error that says what to do; so does a torch that is missing."""
    require_torch()

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_is_out(error):
            raise
        told = str(error)
        said = told.splitlines()[0] if told else "no further details"
        raise DataError(f"out of memory while {what}; {advice} ({said})") from error
