"""Profile → str: what every layer costs, at every size that was measured."""

from __future__ import annotations

from math import hypot
from pathlib import PurePath

from planner.files.profile_file import Profile, SizeProfile
from planner.rendering.plan_text import peak_words
from planner.rendering.table import TableColumn, table_lines
from planner.rendering.wording import (
    clean,
    format_bytes,
    format_column,
    format_count,
    format_percent,
    wrap_parts,
)

DEFAULT_WIDTH = 100


def render_profile(profile: Profile, width: int = DEFAULT_WIDTH) -> str:
    """The profile as text: model and machine, the sizes, and the layers of the largest size."""
    largest = max(profile.sizes, key=lambda size: size.microbatch_size)
    paragraphs = [
        [*wrap_parts(_origin(profile), width), *wrap_parts(_measuring(profile), width)],
        ["  sizes; ms per microbatch, all layers", *_size_table(profile, width)],
        [f"  layers at microbatches of {largest.microbatch_size}; medians in ms", *_layer_table(largest, width)],
        _tied_lines(largest, width),
    ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


def _origin(profile: Profile) -> list[str]:
    model, machine = profile.model, profile.machine
    repeated = f"{model.num_repeated_layers} layers of {clean(model.layer_type)}, " if model.num_repeated_layers else ""
    return [
        clean(PurePath(model.file).name if model.file else model.name),
        f"{repeated}{format_count(model.num_parameters)} parameters ({format_bytes(model.parameter_bytes)})",
        f"{clean(machine.device_name)}, {profile.precision}",
    ]


def _measuring(profile: Profile) -> list[str]:
    versions = ", ".join(f"{clean(name)} {clean(version)}" for name, version in profile.machine.versions.items())
    copies = "1 copy" if profile.concurrent_copies == 1 else f"{profile.concurrent_copies} copies at once"
    if profile.estimated is not None:
        estimated = f"estimated, not measured: {peak_words(profile.estimated)}"
        return [f"{estimated}, for batches of {profile.batch_size}", *([versions] if versions else [])]
    return [
        f"profiled in {profile.seconds:.1f} s ({profile.num_rounds} rounds, {copies})"
        f" for batches of {profile.batch_size}",
        *([versions] if versions else []),
    ]


def _size_table(profile: Profile, width: int) -> list[str]:
    sizes = sorted(profile.sizes, key=lambda size: size.microbatch_size)
    columns = [
        TableColumn("microbatch", [str(size.microbatch_size) for size in sizes], left=True),
        TableColumn("layers", [str(len(size.layers)) for size in sizes]),
        TableColumn("forward", format_column([sum(layer.forward_ms for layer in s.layers) for s in sizes])),
        TableColumn("backward", format_column([sum(layer.backward_ms for layer in s.layers) for s in sizes])),
        TableColumn("optimizer", format_column([_optimizer_ms(size) for size in sizes])),
        TableColumn("spread", [format_percent(_spread(size)) for size in sizes]),
        TableColumn("drift", [format_percent(size.drift) for size in sizes]),
    ]
    return table_lines(columns, width)


def _optimizer_ms(size: SizeProfile) -> float:
    return sum(layer.optimizer_ms for layer in size.layers) + sum(tied.optimizer_ms for tied in size.tied)


def _spread(size: SizeProfile) -> float | None:
    """The standard error of the sum of all medians, as a share of it."""
    total = sum(layer.forward_ms + layer.backward_ms for layer in size.layers)
    error = hypot(*(spread for layer in size.layers for spread in (layer.forward_spread_ms, layer.backward_spread_ms)))
    return error / total if total > 0 else None


def _layer_table(size: SizeProfile, width: int) -> list[str]:
    layers = size.layers
    sent = [0] * len(layers)
    for tensor in size.tensors:
        sent[tensor.producer] += tensor.num_bytes
    forward = format_column([x.forward_ms for x in layers] + [x.forward_spread_ms for x in layers])
    backward = format_column([x.backward_ms for x in layers] + [x.backward_spread_ms for x in layers])
    count = len(layers)
    columns = [
        TableColumn("layer", [layer.id for layer in layers], left=True, name=True),
        TableColumn("type", [clean(layer.type) for layer in layers], left=True, dropped=1),
        TableColumn("forward", forward[:count]),
        TableColumn("±", forward[count:], dropped=2),
        TableColumn("backward", backward[:count]),
        TableColumn("±", backward[count:], dropped=2),
        TableColumn("optimizer", format_column([layer.optimizer_ms for layer in layers]), dropped=3),
        TableColumn("parameters", [format_bytes(layer.parameter_bytes) for layer in layers]),
        TableColumn("sends", [format_bytes(number) for number in sent]),
    ]
    return table_lines(columns, width)


def _tied_lines(size: SizeProfile, width: int) -> list[str]:
    parts = [
        f"{clean(tied.name)} ({format_bytes(tied.parameter_bytes)}) in"
        f" {', '.join(clean(size.layers[index].id) for index in tied.layers)}"
        for tied in size.tied
    ]
    return wrap_parts([f"tied: {parts[0]}", *parts[1:]], width, "  ") if parts else []
