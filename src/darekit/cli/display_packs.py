# SPDX-License-Identifier: Apache-2.0
"""What the commands about packs show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from darekit.cli.display import count_of
from darekit.wording import size_of

if TYPE_CHECKING:
    from darekit.packing.exporting import ExportReport
    from darekit.packing.sharing import Pulled, Pushed
    from darekit.packing.writing import PackReport
    from darekit.packs.reading import Verification

SHOWN = 10


def show_pack(report: PackReport, *, as_json: bool) -> None:
    """What a finished pack is."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    print(
        f"{report.output}: {size_of(report.bytes)}, {report.ratio:.3g} times smaller than the model "
        f"({size_of(report.model_bytes)}), in {report.seconds:.2f} s ({size_of(report.peak_rss_bytes)} of memory)"
    )
    same = f", {report.same} of them the base's own" if report.same else ""
    share = 100 * report.kept / report.parameters if report.parameters else 0
    kept = f"{count_of(report.kept)} elements kept ({share:.3g} %), seed {report.seed}"
    kept = "lossless" if report.lossless else kept
    print(f"  {report.tensors} tensors{same}; {kept}")


def show_info(info: Mapping[str, Any], *, as_json: bool) -> None:
    """What a pack is."""
    if as_json:
        print(json.dumps(info))
        return
    settings = info["settings"]
    share = 100 * info["kept"] / info["parameters"] if info["parameters"] else 0
    lines = {
        "pack": f"{info['pack']}, version {info['version']}, by {info['tool']}",
        "size": f"{size_of(info['bytes'])}, {info['ratio']:.3g} times smaller than the model "
        f"({size_of(info['model_bytes'])})",
        "model": _ref(info["model"]),
        "base": _ref(info["base"]),
        "license": info["license"] or "unknown",
        "kept": f"{count_of(info['kept'])} of {count_of(info['parameters'])} elements ({share:.3g} %)",
        "tensors": ", ".join(f"{count} {word}" for word, count in sorted(info["encodings"].items())),
        "mask": f"{info['mask']}, seed {info['seed']}, rescale {info['rescale']}",
        "settings": ", ".join(f"{key} {_plain(value)}" for key, value in settings.items()),
        "files": ", ".join(file["name"] + ("" if file["stored"] else " (the base's)") for file in info["files"]),
    }
    for word, line in lines.items():
        if line:
            print(f"{word:9} {line}")


def show_verification(found: Verification, *, as_json: bool) -> None:
    """Whether a pack is what it says."""
    if as_json:
        print(json.dumps(found.to_data()))
        return
    if not found.faults:
        what = "its base and every result agree" if found.against_base else "what is stored agrees; give BASE to check"
        more = "" if found.against_base else " the results as well"
        print(f"{found.pack}: {found.tensors} tensors, {what}{more}")
        return
    print(f"{found.pack}: {len(found.faults)} of {found.tensors} tensors are wrong")
    for fault in found.faults[:SHOWN]:
        print(f"  {fault.tensor}: {fault.words}")
    if len(found.faults) > SHOWN:
        print(f"  ... and {len(found.faults) - SHOWN} more")


def show_export(report: ExportReport, *, as_json: bool) -> None:
    """What was exported."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    print(f"{report.output}: {size_of(report.bytes)}, {report.target}")
    if report.target != "dense":
        patches = f"{report.sparse} sparse and {report.dense} dense patches, {count_of(report.changed)} elements"
        print(f"  {patches}; {report.same} tensors are the base's")


def show_pushed(pushed: Pushed, *, as_json: bool) -> None:
    """Where a pack went."""
    if as_json:
        print(json.dumps(pushed.to_data()))
        return
    print(f"{pushed.url}: {', '.join(pushed.files) or 'nothing new'} ({size_of(pushed.bytes)})")


def show_pulled(pulled: Pulled, *, as_json: bool) -> None:
    """What was fetched, and how it goes on."""
    if as_json:
        print(json.dumps(pulled.to_data()))
        return
    print(f"{pulled.pack}: {size_of(pulled.bytes)}, {pulled.tensors} tensors, what is stored agrees with its digests")
    print(f"  base: {_ref(pulled.base)}")
    print(f"  dare unpack {_base_argument(pulled.base)} {pulled.pack} OUT")


def _base_argument(entry: Mapping[str, Any]) -> str:
    if "/" not in entry["ref"]:
        return "BASE"
    return f"{entry['ref']}@{entry['revision']}" if entry.get("revision") else str(entry["ref"])


def _ref(entry: Mapping[str, Any]) -> str:
    commit = f" at commit {entry['revision']}" if entry.get("revision") else ""
    return f"{entry.get('ref', 'unknown')}{commit}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
