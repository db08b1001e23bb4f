"""The profile: what every layer costs on one kind of device, at every microbatch size that was measured.

Schema `evenstage/profile/1`. Times are medians per microbatch in milliseconds; sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planner.errors import FileError
from planner.files.profile_rules import refuse_bad_profile, refuse_bad_size
from planner.files.reading import decode_file, dump_json, read_json, write_text

SCHEMA = "evenstage/profile/1"
Granularity = Literal["module", "operation", "auto"]
Schedule = Literal["gpipe", "1f1b"]


@dataclass(frozen=True, slots=True)
class ModelReference:
    """The model that was profiled or planned. `file` is relative to the file that holds this value.

    `meta`: it was profiled without memory for its weights, one layer at a time.
    """

    file: str | None
    name: str
    entry: str = "build_model"
    layer_type: str = ""
    num_repeated_layers: int = 0
    parameter_bytes: int = 0
    num_parameters: int = 0
    meta: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """Where something was measured, and with which versions.

    `memory_bytes` is what one device has (null on a CPU, whose memory is shared). Tensors cannot have `reserved_bytes`
    of them: the device's context and libraries, what others use of it, and the `workspace_bytes` that matrix products
    keep for themselves in the allocator.
    """

    device: str
    device_name: str
    num_devices: int
    versions: dict[str, str]
    memory_bytes: int | None = None
    reserved_bytes: int = 0
    workspace_bytes: int = 0

    def same_as(self, other: Machine) -> bool:
        """Whether times of one hold on the other: the same kind of device, with the same versions."""
        return (self.device_name, self.versions) == (other.device_name, other.versions)


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device does at most, which an estimate takes for granted; `source` says where the two rates are from."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    source: str


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer and one microbatch; peaks are what the layer makes and has alive at most.

    `saved_bytes` stay alive from its forward to a backward. A backward frees what forwards, and layers behind, made;
    so it has a peak before every such freeing that a higher one follows, and one after all of them:
    `backward_first_peaks_bytes` where the layer's gradients are made, `backward_peaks_bytes` where they are added to.
    `trainable_bytes` are the parameters that get a gradient; tied ones are in `SizeProfile.tied`. The optimizer's
    temporaries are larger by `optimizer_left_bytes` in a stage that also holds the layer `optimizer_left_by`, whose
    parameters it updates just before.
    """

    forward_peak_bytes: int
    saved_bytes: int
    backward_peaks_bytes: tuple[int, ...]
    backward_first_peaks_bytes: tuple[int, ...]
    trainable_bytes: int
    buffer_bytes: int
    optimizer_state_bytes: int
    optimizer_temporary_bytes: int
    optimizer_left_bytes: int = 0
    optimizer_left_by: str = ""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Bytes of a microbatch that layer `made` makes in forward and that outlive it; indices of layers.

    Freed in the forward or backward of layer `freed`. `last_reader` is the last layer whose forward reads them, -1 for
    none beyond their own and the number of layers for an output of the model: a stage that ends before it keeps them
    until its own backward is done. A backward frees them after its peak number `freed_after`.
    """

    made: int
    last_reader: int
    freed_in: Literal["forward", "backward"]
    freed: int
    num_bytes: int
    freed_after: int = 0


@dataclass(frozen=True, slots=True)
class GradientLifetime:
    """Bytes of a microbatch's gradients of activations, from the backward of layer `made` to that of layer `freed`.

    There they are freed after its peak number `freed_after`. A gradient that another is added to ends there, and their
    sum is a new one: autograd adds in place where it may, but not into what a stage receives. `gradient_of` are
    the makers of the values that the gradient is of, and the bytes of each: several where it is passed on unchanged, as
    a sum's to its terms. `reads` are the layers whose backward computes other gradients from it, and the bytes read.
    """

    made: int
    freed: int
    num_bytes: int
    freed_after: int = 0
    gradient_of: tuple[tuple[int, int], ...] = ()
    reads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SizeMemory:
    """What outlives its layer at one microbatch size, the bytes of a microbatch's inputs and of its targets.

    `temporaries_add`: the optimizer's temporaries of several layers exist at once; else one layer's at a time.
    `fragmentation_bytes`: what the allocator took from a GPU for a step of the whole model beyond what was in use.
    """

    lifetimes: tuple[Lifetime, ...]
    gradients: tuple[GradientLifetime, ...]
    input_bytes: int
    target_bytes: int
    temporaries_add: bool
    fragmentation_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer: the operations between two neighbouring legal cuts, named after the module that it begins.

    `forward_ms` and `backward_ms` are medians per microbatch (backward accumulates into existing gradients);
    `backward_first_ms` is the backward of a step's first microbatch; `…_spread_ms` is 1.25 · MAD / √n, the standard
    error of the median. `optimizer_ms` covers the layer's own parameters; tied ones are in `Profile.tied`.
    `memory` is null where it was not measured, `flops` (of the forward, without the loss) where they were not counted.
    """

    id: str
    name: str
    type: str
    position: int
    forward_ms: float
    forward_spread_ms: float
    backward_ms: float
    backward_spread_ms: float
    backward_first_ms: float
    optimizer_ms: float
    parameter_bytes: int
    parameters: tuple[str, ...]
    plain_cut: bool
    flops: int | None = None
    structure: str = ""
    memory: LayerMemory | None = None


@dataclass(frozen=True, slots=True)
class TensorProfile:
    """A tensor that leaves its layer: indices into the layers, bytes forward, gradient bytes backward.

    One that is not `contiguous` is copied where a cut sends it. A gradient that was `gradient_scattered` in memory
    arrives in one piece across a cut, and the layer that made the tensor copies it. One that came in a receive buffer
    and is handed on unchanged goes back as a copy, but with `returns_view` as a view of that buffer.
    """

    name: str
    producer: int
    consumers: tuple[int, ...]
    num_bytes: int
    gradient_bytes: int
    contiguous: bool = True
    gradient_scattered: bool = False
    returns_view: bool = False


@dataclass(frozen=True, slots=True)
class TiedProfile:
    """A parameter that several layers use: `layers` are indices; its bytes and optimizer time count once per stage."""

    name: str
    layers: tuple[int, ...]
    parameter_bytes: int
    optimizer_ms: float
    trainable: bool = True
    optimizer_state_bytes: int = 0
    optimizer_temporary_bytes: int = 0
    optimizer_left_bytes: int = 0
    optimizer_left_by: str = ""


@dataclass(frozen=True, slots=True)
class SizeProfile:
    """All layers at one microbatch size, with the fingerprint of the trace at that size.

    `dependencies` are pairs (earlier, later) of indices of layers that keep their sequence in every order; null where
    that is unknown, so that the layers stay in program order. `periods` say how much slower than on average (a
    fraction) all layers were in each stretch of the rounds, `drift` how far apart the two halves of them were. The
    boundary of two stages costs each of them `boundary_forward_ms` and `boundary_backward_ms` of work a microbatch.
    """

    microbatch_size: int
    fingerprint: str
    layers: tuple[LayerProfile, ...]
    tensors: tuple[TensorProfile, ...]
    tied: tuple[TiedProfile, ...]
    drift: float
    memory: SizeMemory | None = None
    dependencies: tuple[tuple[int, int], ...] | None = None
    periods: tuple[float, ...] = ()
    boundary_forward_ms: float = 0.0
    boundary_backward_ms: float = 0.0

    def __post_init__(self) -> None:
        refuse_bad_size(self)


@dataclass(frozen=True, slots=True)
class Tracing:
    """How many exports one copy of the profile made for all its sizes, and their wall time."""

    num_exports: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything that planning needs to know about a model on a kind of device.

    `granularity` is what was asked for: layers that begin with modules, with operations, or with operations where the
    balance needs it. `training` is the digest of what is trained and how (planner/tracing/training_digest.py).
    `tracing` is null where it was not counted. `estimated` is null where times were measured; else they were computed
    from FLOPs and bytes at that peak, and nothing was run. `schedule` is the one under which the stages of the profile
    ran; null where they ran one after the other. `repeats` are relative differences between profiles of this model on
    this machine, newest last; see planner/intervals.py.
    """

    model: ModelReference
    machine: Machine
    precision: Literal["fp32", "bf16"]
    batch_size: int
    num_rounds: int
    seconds: float
    concurrent_copies: int
    sizes: tuple[SizeProfile, ...]
    why_not_plain: str = ""
    training: str = ""
    tracing: Tracing | None = None
    granularity: Granularity = "module"
    estimated: Peak | None = None
    repeats: tuple[float, ...] = ()
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        refuse_bad_profile(self)

    def differs_in_schedule(self, schedule: Schedule | None) -> bool:
        """Whether the times are known to be those of another schedule."""
        return None not in (self.schedule, schedule) and self.schedule != schedule

    def size(self, microbatch_size: int) -> SizeProfile:
        """The measurements at `microbatch_size`. Raises FileError where that size was not profiled."""
        for size in self.sizes:
            if size.microbatch_size == microbatch_size:
                return size
        known = ", ".join(str(size.microbatch_size) for size in self.sizes)
        raise FileError(
            f"microbatches of {microbatch_size} were not profiled", f"this profile has {known}", "profile with --fresh"
        )

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically."""
        write_text(path, dump_json(self, SCHEMA))

    @staticmethod
    def load(path: Path | str) -> Profile:
        """Read a profile. Raises FileError with what is wrong and where."""
        return decode_file(Profile, read_json(Path(path), SCHEMA), "profile", path)
