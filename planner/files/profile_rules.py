"""What must hold inside a profile, however it came about: one clear error for the first rule that is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.errors import FileError

if TYPE_CHECKING:
    from planner.files.profile_file import Profile, SizeProfile

MOST_SAMPLES = 10**9


def refuse_bad_profile(profile: Profile) -> None:
    """Raise FileError for a profile of nothing, or with a drift that no times can have."""
    if not profile.sizes or profile.batch_size < 1:
        got = f"{len(profile.sizes)} microbatch sizes of batches of {profile.batch_size} samples"
        raise _wrong(got, "a profile has at least one of each")
    if profile.concurrent_copies < 0:
        raise _wrong(f"{profile.concurrent_copies} copies", "copies are counted from 0, which is none, on")
    if profile.batch_size > MOST_SAMPLES:
        raise _wrong(f"batches of {profile.batch_size:,}", f"a batch has at most {MOST_SAMPLES:,} samples")
    if min(profile.repeats, default=0.0) < -1:
        raise _wrong("a repeat below −100 %", "no time becomes negative")


def refuse_bad_size(size: SizeProfile) -> None:
    """Raise FileError for the first rule that the measurements at one microbatch size break."""
    count = len(size.layers)
    if not count:
        raise _wrong("a profile without layers", "a model has at least one layer")
    if size.microbatch_size < 1:
        raise _wrong(f"microbatches of {size.microbatch_size}", "they have at least one sample")
    if len({layer.id for layer in size.layers}) < count:
        raise _wrong("two layers of one id", "every layer has an id of its own")
    if size.memory is not None and any(layer.memory is None for layer in size.layers):
        raise _wrong("a layer without memory", "it is known of all layers or of none")
    if min((size.drift, *size.periods)) < -1:
        raise _wrong("a drift below −100 %", "no time becomes negative")
    named = [(f"tensor {tensor.name!r}", (tensor.producer, *tensor.consumers)) for tensor in size.tensors]
    named += [(f"the tied parameter {tied.name!r}", tied.layers) for tied in size.tied]
    for what, layers in named:
        if not layers or not all(0 <= index < count for index in layers):
            raise _wrong(f"{what} names a layer that is not there", f"layers are 0 to {count - 1}")
    for earlier, later in size.dependencies or ():
        if not 0 <= earlier < later < count:
            rule = f"an earlier layer comes first, and layers are 0 to {count - 1}"
            raise _wrong(f"the dependency of layer {later} on {earlier}", rule)


def _wrong(got: str, rule: str) -> FileError:
    return FileError(got, rule, "profile the model again")
