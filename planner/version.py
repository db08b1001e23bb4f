"""The installed version."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The version of the installed distribution, or "0+unknown" where the sources run uninstalled."""
    try:
        return installed_version("evenstage")
    except PackageNotFoundError:
        return "0+unknown"
