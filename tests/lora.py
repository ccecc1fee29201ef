# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT itself makes on tiny models, with factors that are nowhere zero, and what PEFT makes of them."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

import darekit as dk
import families
import tiny


def fill(model, seed=0):
    """Give every trained parameter values; magnitudes stay near what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise.abs())
                elif "lora" in name:
                    parameter.copy_(0.03 * noise)
                else:
                    parameter.add_(0.02 * noise)


def make(root, adapter, name="LlamaForCausalLM", *, seed=0, grow=0, base="base", changes=None, **config):
    """root/base, root/ADAPTER, and root/ADAPTER-merged, which is what PEFT's merge_and_unload makes of the two.

    Args:
        root: a folder.
        adapter: name of the folder.
        name: class of the model.
        seed: of the factors.
        grow: tokens that the vocabulary gets before the training.
        base: folder of the base, which is made where it is not there.
        changes: to the model's config.
        config: of LoRA.
    """
    root = Path(root)
    if not (root / base).exists():
        tiny.build(name, **(changes or {})).save_pretrained(root / base)
    model = getattr(transformers, name).from_pretrained(root / base)
    if grow:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + grow, mean_resizing=False)
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what is tested here
        trained = peft.get_peft_model(model, settings)
        fill(trained, seed)
        trained.save_pretrained(root / adapter)
        np.save(root / f"{adapter}-says.npy", says(trained))
        trained.merge_and_unload().save_pretrained(root / f"{adapter}-merged")
    return root / adapter


def says(model):
    """What a language model answers to a few tokens; None of another model."""
    if "ForCausalLM" not in type(getattr(model, "base_model", model)).__name__ + str(model.config.architectures):
        return np.empty(0)
    with torch.no_grad():
        return model.eval()(torch.arange(1, 13)[None]).logits.float().numpy()


def same_answers(out, root, adapter="a"):
    """Fail where a folder's model does not answer as the adapter did on its base, before PEFT merged them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    wanted = np.load(Path(root) / f"{adapter}-says.npy")
    assert np.abs(says(model) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def agree(found, wanted, within=1e-6):
    """Fail where two folders' tensors are not of the same names and shapes, and equal but for rounding."""
    one, other = families.load(found), families.load(wanted)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        if one[name].size:
            most = np.abs(other[name]).max()
            assert np.abs(one[name] - other[name]).max() <= within * max(most, 1e-12), name


def merge(out, base, *models, method="task_arithmetic", **keys):
    """Merge models that are added to a base with weight 1; -> what dk.merge gives."""
    data = {
        "merge_method": method, "base_model": None if base is None else str(base),
        "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models], **keys,
    }  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    return dk.merge({key: value for key, value in data.items() if value is not None}, out, threads=1)


def edit(adapter, **changes):
    """Set keys of an adapter's config; None removes one."""
    path = Path(adapter) / "adapter_config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite(adapter, change):
    """`change` an adapter's tensors, a dict of numpy arrays, in place or by what it returns."""
    path = Path(adapter) / "adapter_model.safetensors"
    tensors = families.load_file(path)
    found = change(tensors)
    families.write_safetensors(path, tensors if found is None else found)
