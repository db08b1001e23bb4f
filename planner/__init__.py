"""evenstage's planner: from a model file to a balanced, proven plan for pipeline parallelism.

>>> from planner import Plan, make_plan
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.files.plan_file import Plan as Plan
    from planner.files.profile_file import Profile as Profile
    from planner.planning import make_plan as make_plan

__all__ = ["Plan", "Profile", "make_plan"]


def __getattr__(name: str) -> Any:
    """Load what is asked for only then, so that `plan --help` needs neither torch nor a solver."""
    if name == "Plan":
        from planner.files.plan_file import Plan

        return Plan
    if name == "Profile":
        from planner.files.profile_file import Profile

        return Profile
    if name == "make_plan":
        from planner.planning import make_plan

        return make_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
