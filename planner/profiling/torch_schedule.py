"""Which of torch's schedules runs a plan: the same one for the profile as for training."""

from __future__ import annotations

from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

from planner.files.profile_file import Schedule


def schedule_class(schedule: Schedule | None) -> type[Schedule1F1B] | type[ScheduleGPipe]:
    """torch's class of a schedule; GPipe's where a plan has none.

    >>> schedule_class("1f1b").__name__, schedule_class(None).__name__
    ('Schedule1F1B', 'ScheduleGPipe')
    """
    return Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
