# SPDX-License-Identifier: Apache-2.0
"""A plan's output as a model in torch's memory whose weights have no values yet, with its tokenizer."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from darekit.checkpoints import companions
from darekit.checkpoints.writing import write_beside
from darekit.errors import CheckpointError, DarekitError, PlanError, Unsupported
from darekit.live.loading import state_of
from darekit.planning.plan import Plan
from darekit.planning.travel.beside import companions_of

# Where a config names no class: the auto classes that are asked, in order.
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModel",
)


def skeleton(plan: Plan, device: str | None, dtype: str | None) -> tuple[Any, Any, Mapping[str, Any]]:
    """A plan -> (model without values, its tokenizer or None, its config.json). As `from_pretrained` makes it: its
    parameters have the dtype that it computes in, but for those that it keeps in float32; nothing is tied yet.

    Raises:
        DarekitError: see `darekit.errors`.
    """
    import torch
    import transformers

    where = _device(device)
    with tempfile.TemporaryDirectory(prefix="darekit-") as folder, quiet_transformers():
        found = companions_of(plan)
        if found.config is None:
            raise CheckpointError(f"{plan.checkpoints[0].ref} has no config.json, so its architecture is unknown")
        write_beside(Path(folder), config=found.config, files=found.files, chat_template=found.chat_template)
        with _unknown_told(plan.checkpoints[0].ref):
            cls, config = _class_of(folder, found.config)
        own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        compute = dtype or ("float32" if where.type == "cpu" else own)
        wanted = getattr(torch, compute, None)
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise PlanError(
                f"dtype {compute!r} is not a floating-point dtype in torch; use float32, bfloat16 or float16"
            )
        with _unknown_told(plan.checkpoints[0].ref):
            model = _made(cls, config, where, wanted)
        generation = Path(folder) / "generation_config.json"
        if generation.is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = _tokenizer(folder)
    return model, tokenizer, found.config


def _made(cls: Any, config: Any, where: Any, dtype: Any) -> Any:
    import torch
    import transformers

    is_new = int(transformers.__version__.split(".")[0]) >= 5
    with _no_init(), torch.device(where):
        model = cls._from_config(config, **{"dtype" if is_new else "torch_dtype": dtype})
    if is_new:
        kept = [re.compile(name.replace("*", ".*")) for name in model._get_dtype_plan(dtype)]
        for name, tensor in state_of(model).items():
            if any(word.search(name) for word in kept):
                tensor.data = tensor.data.float()
    else:
        model.tie_weights()  # skipped with the initial values
    return model.to(device=where).eval().requires_grad_(False)


@contextmanager
def _unknown_told(ref: str) -> Iterator[None]:
    """Whatever transformers raises where it cannot make a model of a config becomes an error that says so."""
    import transformers

    try:
        yield
    except (DarekitError, MemoryError, RuntimeError):  # the last: torch's, such as a full memory
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise Unsupported(
                f"transformers {transformers.__version__} can run {ref} only with the code "
                "that its config.json names (auto_map), and darekit never runs a checkpoint's code. Merging works"
            ) from None
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Unsupported(f"transformers {transformers.__version__} does not know this model: {said}") from error


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


def _class_of(folder: str, data: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class that a config names (else that of its model type), and the config as that class reads it."""
    import transformers

    for name in data.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):  # not just any name of theirs
            cls: Any = found
            return cls, cls.config_class.from_pretrained(folder, local_files_only=True)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for auto in _AUTO:
        mapped = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if mapped is not None:
            return mapped[0] if isinstance(mapped, tuple | list) else mapped, config
    raise ValueError(f"its config.json names no class, and transformers has none for {config.model_type}")


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
