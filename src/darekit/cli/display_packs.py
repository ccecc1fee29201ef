# SPDX-License-Identifier: Apache-2.0
"""What the commands about packs show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from darekit.cli import tables
from darekit.cli.display import count_of, counted, time_of
from darekit.wording import size_of

if TYPE_CHECKING:
    from darekit.packing.exporting import ExportReport
    from darekit.packing.sharing import Pulled, Pushed
    from darekit.packing.writing import PackReport
    from darekit.packs.verifying import Verification

SHOWN = 10
EXPORTS = {"vllm-patch": "weight patches for vLLM", "dense": "a dense model directory"}


def show_pack(report: PackReport, *, as_json: bool) -> None:
    """What a finished pack is."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    print(
        f"Wrote {report.output}: {size_of(report.bytes)}, {report.ratio:.3g} times smaller than the model "
        f"({size_of(report.model_bytes)})"
    )
    same = f", {report.same} of them equal to the base's" if report.same else ""
    share = 100 * report.kept / report.parameters if report.parameters else 0
    tables.print_facts([
        ("kept", "everything: the pack is lossless" if report.lossless else
         f"{share:.3g} % of the delta ({count_of(report.kept)} of {count_of(report.parameters)} elements)"),
        ("tensors", f"{report.tensors}{same}"),
        ("seed", "" if report.lossless else f"{report.seed}"),
        ("took", f"{time_of(report.seconds)}, {size_of(report.peak_rss_bytes)} of memory at most"),
    ])  # fmt: skip


def show_info(info: Mapping[str, Any], *, as_json: bool) -> None:
    """What a pack is."""
    if as_json:
        print(json.dumps(info))
        return
    settings = info["settings"]
    share = 100 * info["kept"] / info["parameters"] if info["parameters"] else 0
    print(f"{info['pack']}: {size_of(info['bytes'])}, {info['ratio']:.3g} times smaller than the model")
    tables.print_facts([
        ("model", f"{_ref(info['model'])} ({size_of(info['model_bytes'])})"),
        ("base", _ref(info["base"])),
        ("license", info["license"] or "unknown"),
        ("kept", f"{share:.3g} % of the delta ({count_of(info['kept'])} of {count_of(info['parameters'])} elements)"),
        ("settings", ", ".join(f"{key} {_plain(value)}" for key, value in settings.items())),
        ("tensors", ", ".join(f"{count} {word}" for word, count in sorted(info["encodings"].items()))),
        ("mask", f"{info['mask']}, seed {info['seed']}, rescale {info['rescale']}"),
        ("files", ", ".join(file["name"] + ("" if file["stored"] else " (the base's)") for file in info["files"])),
        ("format", f"version {info['version']}, written by {info['tool']}"),
    ])  # fmt: skip


def show_verification(found: Verification, *, as_json: bool) -> None:
    """Whether a pack is what it says."""
    if as_json:
        print(json.dumps(found.to_data()))
        return
    if not found.faults:
        tensors = counted(found.tensors, "tensor")
        if found.against_base:
            print(f"ok: {found.pack}: {tensors}, intact; unpacked on this base, each matches its digest")
        else:
            print(f"ok: {found.pack}: {tensors}, intact; give BASE to check the unpacked results too")
        return
    print(f"damaged: {found.pack}: {len(found.faults)} of {counted(found.tensors, 'tensor')}")
    for fault in found.faults[:SHOWN]:
        print(f"  {fault.tensor}: {fault.words}")
    if len(found.faults) > SHOWN:
        print(f"  and {len(found.faults) - SHOWN} more; --json lists them all")


def show_export(report: ExportReport, *, as_json: bool) -> None:
    """What was exported."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    print(f"Wrote {report.output}: {size_of(report.bytes)}, {EXPORTS.get(report.target, report.target)}")
    if report.target != "dense":
        tables.print_facts([
            ("patches", f"{report.sparse} sparse and {report.dense} dense; they change {count_of(report.changed)} "
             "elements"),
            ("unchanged", counted(report.same, "tensor") if report.same else ""),
        ])  # fmt: skip


def show_pushed(pushed: Pushed, *, as_json: bool) -> None:
    """Where a pack went."""
    if as_json:
        print(json.dumps(pushed.to_data()))
        return
    what = f"{', '.join(pushed.files)} ({size_of(pushed.bytes)})" if pushed.files else "nothing new"
    print(f"Pushed to {pushed.url}: {what}")


def show_pulled(pulled: Pulled, *, as_json: bool) -> None:
    """What was fetched, and what to do with it."""
    if as_json:
        print(json.dumps(pulled.to_data()))
        return
    print(f"Wrote {pulled.pack}: {size_of(pulled.bytes)}, {counted(pulled.tensors, 'tensor')}, intact")
    tables.print_facts([
        ("base", _ref(pulled.base)),
        ("next", f"dare unpack {_base_argument(pulled.base)} {pulled.pack} OUT"),
    ])  # fmt: skip


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
