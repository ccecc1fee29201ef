# SPDX-License-Identifier: Apache-2.0
"""Models in torch's memory: opened from a checkpoint or a plan, and their weights replaced through the engine.

The engine writes its tiles straight into the live model's tensors: no checkpoint is written, and besides the model
there are only a few tiles in memory.
"""

from __future__ import annotations

import bisect
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darekit.checkpoints import Placement, companions
from darekit.dtypes import Bytes, DType, dtype_named
from darekit.engine import execution
from darekit.errors import CheckpointError, DataError, HomologyError, PlanError, Unsupported
from darekit.output.companions import companions_of, write_companions
from darekit.planning.opening import open_plan
from darekit.planning.plan import Plan
from darekit.recipe import Recipe, read_recipe

CAUSAL, CLASSIFIER, REGRESSOR = "causal", "classifier", "regressor"


@dataclass
class LiveModel:
    """A model that runs.

    Attributes:
        model: the torch module, in evaluation mode.
        tokenizer: its tokenizer, None where there is none.
        task: causal, classifier or regressor.
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
        """Tokens that one example may have."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(getattr(self.model.config, name, None), int):
                return int(getattr(self.model.config, name))
        return 2048

    def put(self, plan: Plan, *, threads: int | None = None) -> None:
        """Replace the weights by those that the plan makes, to the bit that a merge would write.

        The plan's checkpoints must be open, and its output must have this model's shapes.

        Raises:
            HomologyError: the output has other tensors than this model.
            DataError: NaN, Inf, an overflow, or a damaged pack; the weights are undefined then.
        """
        targets, tied = self._targets()
        places = [place for shard in plan.shards for place in shard.placements]
        known = {place.name: self._name(place.name, targets) for place in places}
        wrong = [
            f"{place.name} {tuple(place.shape)}"
            for place in places
            if (name := known[place.name]) is not None and tuple(targets[name].shape) != tuple(place.shape)
        ]
        given = set(known.values())
        lacking = [name for name in targets if name not in given and name not in tied]
        if wrong or lacking:
            what = "other shapes" if wrong else "no value"
            raise HomologyError(
                f"the merged tensors do not fit this model: {what} for {', '.join((wrong or lacking)[:4])}"
                f"{', ...' if len(wrong or lacking) > 4 else ''}"
            )
        live = {name: None if target is None else targets[target] for name, target in known.items()}
        sinks = [_Shard(shard.placements, live) for shard in plan.shards]
        names = [model.ref for model in plan.models]
        done = execution.run(plan.steps, sinks, names=names, threads=threads)
        plan.refuse_damaged(done.records, "the model in memory is unusable now (reload it)")

    def tensors(self, names: Iterable[str]) -> dict[str, Any]:
        """Names in the checkpoint -> live tensors, each under its first name; names of nothing here are left out."""
        targets, _ = self._targets()
        found: dict[str, Any] = {}
        seen = set()
        for name in names:
            known = self._name(name, targets)
            if known is not None and targets[known].data_ptr() not in seen:
                found[name] = targets[known]
                seen.add(targets[known].data_ptr())
        return found

    def _targets(self) -> tuple[dict[str, Any], set[str]]:
        """Name -> tensor of everything that a checkpoint holds, and the names that only repeat another's memory."""
        import torch

        state = {k: v for k, v in self.model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
        seen: set[tuple[int, tuple[int, ...]]] = set()
        tied = set()
        for name, tensor in state.items():
            key = tensor.data_ptr(), tuple(tensor.shape)
            if tensor.numel() and key in seen:
                tied.add(name)
            seen.add(key)
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        optional = {name for name in state if any(re.search(pattern, name) for pattern in ignored)}
        return state, tied | optional

    def _name(self, name: str, targets: Mapping[str, Any]) -> str | None:
        """The module's name for a checkpoint's: checkpoints of the bare backbone lack its prefix, and the reverse."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in targets:
                return candidate
        return None


class _Shard:
    """Where one shard's bytes go: into the live tensors, converted to the format that they compute in."""

    def __init__(self, placements: Sequence[Placement], targets: Mapping[str, Any]) -> None:
        self.places = []
        for place in sorted(placements, key=lambda place: place.offset):
            tensor = targets[place.name]
            flat = None if tensor is None else tensor.detach().view(-1)
            self.places.append((place.offset, flat, dtype_named(place.dtype)))
        self.starts = [offset for offset, _, _ in self.places]

    def write(self, buffer: Bytes, offset: int) -> None:
        """Tiles never cross tensors."""
        import torch

        begin, flat, dtype = self.places[bisect.bisect_right(self.starts, offset) - 1]
        if flat is None:
            return
        values = torch.frombuffer(buffer, dtype=_torch_dtype(dtype))
        at = (offset - begin) // dtype.itemsize
        with torch.no_grad():
            flat[at : at + values.numel()].copy_(values)


def _torch_dtype(dtype: DType) -> Any:
    import torch

    return getattr(torch, dtype.torch_name)


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
        live = _empty(plan, device, dtype)
        live.put(plan)
    return live


def _require_torch() -> None:
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise Unsupported(f"running a model needs {' and '.join(missing)}: pip install 'darekit[torch]'")


def _empty(plan: Plan, device: str | None, dtype: str | None) -> LiveModel:
    import torch
    import transformers

    where = _device(device)
    with tempfile.TemporaryDirectory(prefix="darekit-") as folder, quiet_transformers():
        found = companions_of(plan)
        if found.config is None:
            raise CheckpointError(f"{plan.checkpoints[0].ref} has no config.json, so its architecture is unknown")
        write_companions(Path(folder), config=found.config, files=found.files, recipe_text="", card=lambda: "")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            cls = _class_of(config, found.config)
        except (ValueError, KeyError, OSError, AttributeError) as error:
            if "trust_remote_code" in str(error):
                raise Unsupported(
                    f"transformers {transformers.__version__} can run {plan.checkpoints[0].ref} only with the code "
                    "that its config.json names (auto_map), and darekit never runs a checkpoint's code. Merging works"
                ) from None
            raise Unsupported(f"transformers {transformers.__version__} does not know this model: {error}") from error
        own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        compute = dtype or ("float32" if where.type == "cpu" else own)
        found_dtype = getattr(torch, compute, None)
        if not isinstance(found_dtype, torch.dtype) or not found_dtype.is_floating_point:
            raise PlanError(
                f"dtype {compute!r} is not a floating-point dtype in torch; use float32, bfloat16 or float16"
            )
        config.dtype = compute
        with _no_init(), torch.device(where):
            model = cls(config)
        model.tie_weights()  # skipped with the initial values
        model = model.to(device=where, dtype=getattr(torch, compute)).eval()
        model.requires_grad_(False)
        generation = Path(folder) / "generation_config.json"
        if generation.is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = _tokenizer(folder)
    return LiveModel(model, tokenizer, _task_of(model, config), where, found.config)


def _tokenizer(folder: str) -> Any:
    import transformers

    if not any(any(Path(folder).glob(pattern)) for pattern in companions.TOKENIZER):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:  # the last: sentencepiece is not installed
        if "trust_remote_code" in str(error):
            raise Unsupported(
                "the tokenizer needs the code that its tokenizer_config.json names (auto_map), and darekit never "
                "runs a checkpoint's code"
            ) from None
        raise CheckpointError(f"the tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _class_of(config: Any, data: Mapping[str, Any]) -> Any:
    import transformers

    for name in data.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):  # not just any name of theirs
            return found
    auto = transformers.AutoModelForCausalLM
    mapped = auto._model_mapping.get(type(config), None)
    if mapped is None:
        raise ValueError(f"no architecture named, and {config.model_type} has no causal model")
    return mapped[0] if isinstance(mapped, tuple | list) else mapped


def _task_of(model: Any, config: Any) -> str:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        regression = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
        return REGRESSOR if regression else CLASSIFIER
    return CAUSAL


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps is not None and mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).splitlines()[0] if name.split(":")[0] in ("cpu", "cuda", "mps") else "unknown device type"
        raise PlanError(f"no device {name!r} here ({reason}); expected cpu, cuda, cuda:1 or mps") from error
    return device


@contextmanager
def _no_init() -> Iterator[None]:
    """Random initial values would cost more than reading the real ones."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice on standard error, restored afterwards."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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


LOADING_ADVICE = "use --dtype bfloat16, which takes half of float32's memory, or another --device"
BATCH_ADVICE = "use a smaller --batch-size or --max-length, --dtype bfloat16, or --device cpu"


@contextmanager
def memory_told(what: str, advice: str = BATCH_ADVICE) -> Iterator[None]:
    """Out of memory becomes an error that says what to do; so does a torch that is missing."""
    _require_torch()
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        known = ("not enough memory", "out of memory", "can't allocate memory")  # Windows, CUDA, Linux
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(text in told for text in known):
            raise
        said = told.splitlines()[0] if told else "no further details"
        raise DataError(f"out of memory while {what}; {advice} ({said})") from error
