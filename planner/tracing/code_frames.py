"""Where in the user's code something happened: lines out of a traceback, a traced operation, or a forward."""

from __future__ import annotations

import inspect
import linecache
import re
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from torch import fx, nn

PACKAGES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
STANDARD = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
OURS = str(Path(__file__).resolve().parents[1])
PLUMBING = ("torch/nn/modules/module.py", "torch/nn/modules/container.py")
ENTRY = re.compile(r'File "(.+?)", line (\d+), in .*\n\s*(.*)')


def error_frames(error: BaseException, limit: int = 3) -> tuple[str, ...]:
    """The last `limit` lines of code behind `error`, as `file:line: text`, outermost first.

    They are the user's own lines, and the innermost line of a library that they called (a Hugging Face model, a module
    of torch.nn), named by its path in the package. What called us, torch's machinery and Python's own are left out.
    """
    entries = [(f.filename, f.lineno or 0, f.line or "") for f in traceback.extract_tb(error.__traceback__)]
    own = [index for index, (file, _, _) in enumerate(entries) if file.startswith(OURS)]
    return _chosen(entries[own[-1] + 1 :] if own else entries, limit)


def operation_frames(node: fx.Node, limit: int = 3) -> tuple[str, ...]:
    """The lines of code that a traced operation comes from, as `error_frames` gives them."""
    found = ENTRY.findall(node.meta.get("stack_trace") or "")
    return _chosen([(file, int(line), text) for file, line, text in found], limit)


def operation_module(node: fx.Node) -> str:
    """The name of the innermost module that a traced operation comes from; empty where it is the model's own."""
    names = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name]
    return names[-1] if names else ""


def forward_frame(model: nn.Module, *, last_return: bool = False) -> tuple[str, ...]:
    """The line at which `model`'s forward begins, or its last `return`; nothing where there is no source."""
    try:
        forward = inspect.unwrap(type(model).forward)
        lines, start = inspect.getsourcelines(forward)
        file = inspect.getsourcefile(forward) or ""
    except (OSError, TypeError):
        return ()
    wanted = "return" if last_return else "def "
    found = [index for index, line in enumerate(lines) if line.lstrip().startswith(wanted)]
    index = (found[-1] if last_return else found[0]) if found else 0
    return (_shown(file, start + index, lines[index].strip()),)


def _chosen(entries: list[tuple[str, int, str]], limit: int) -> tuple[str, ...]:
    own = [index for index, (file, _, _) in enumerate(entries) if not _foreign(file)]
    after = entries[own[-1] + 1 :] if own else entries
    library = [entry for entry in after if _worth_showing(entry[0])][-1:]
    shown = [entries[index] for index in own][-(limit - len(library)) :] + library
    return tuple(_shown(*entry) for entry in shown)


def _foreign(file: str) -> bool:
    return file.startswith(("<", OURS, *PACKAGES, *STANDARD))


def _worth_showing(file: str) -> bool:
    """Whether `file` is part of a library that a user chose: torch.nn or an installed package, not torch itself."""
    name = _in_package(file)
    return (
        bool(name) and name not in PLUMBING and (name.startswith("torch/nn/modules/") or not name.startswith("torch/"))
    )


def _in_package(file: str) -> str:
    for folder in PACKAGES:
        if file.startswith(folder):
            return Path(file).relative_to(folder).as_posix()
    return ""


def _shown(file: str, line: int, text: Any) -> str:
    name = _in_package(file) or Path(file).name
    return f"{name}:{line}: {str(text).strip() or linecache.getline(file, line).strip()}"
