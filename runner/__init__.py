"""evenstage's runner: trains a plan through torch's pipelining, measures it, compares.

>>> from runner import compare, train
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.comparing import compare as compare
    from runner.running import train as train

__all__ = ["compare", "train"]


def __getattr__(name: str) -> Any:
    """Load what is asked for only then."""
    if name == "compare":
        from runner.comparing import compare

        return compare
    if name == "train":
        from runner.running import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
