"""evenstage's planner: from a model file to a balanced, proven plan for pipeline parallelism.

>>> from planner import Plan, make_plan
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.files.plan_file import Plan as Plan
    from planner.files.profile_file import Profile as Profile
    from planner.measuring import estimate as estimate
    from planner.measuring import measure as measure
    from planner.planning import make_plan as make_plan

__all__ = ["Plan", "Profile", "estimate", "make_plan", "measure"]


def __getattr__(name: str) -> Any:
    """Load what is asked for only then, so that `plan --help` needs neither torch nor a solver."""
    if name == "Plan":
        from planner.files.plan_file import Plan

        return Plan
    if name == "Profile":
        from planner.files.profile_file import Profile

        return Profile
    if name in ("estimate", "measure"):
        import planner.measuring

        return getattr(planner.measuring, name)
    if name == "make_plan":
        from planner.planning import make_plan

        return make_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
