"""Whether a layer made a tensor or was given it: dropout with p = 0 returns what it was given."""

from __future__ import annotations

from typing import Any

import torch

SEEN_BY = "_seen_by"


def first_seen(value: Any, by: object) -> bool:
    """Whether `value` is a tensor that `by` has not seen before. The tensor remembers it, for an id may be used again.

    >>> tensor, run = torch.ones(1), object()
    >>> first_seen(tensor, run), first_seen(tensor, run), first_seen(tensor, object())
    (True, False, True)
    """
    if not isinstance(value, torch.Tensor) or getattr(value, SEEN_BY, None) is by:
        return False
    setattr(value, SEEN_BY, by)
    return True
