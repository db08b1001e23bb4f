"""Why a model cannot be exported, said in terms of the user's code: the line, the rule and the usual remedy.

`CAUSES` is a table of what torch 2.13 says for each kind of failure; the first row that fits is shown. What no row
fits is told apart by running the model eagerly: either forward fails by itself, or torch.export does.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from planner.errors import DEBUG, TraceError
from planner.tracing.code_frames import error_frames, forward_frame

ONE_GRAPH = "torch.export records one graph that is right for every batch, so it cannot look at the values of tensors"
ARGUMENTS = "the inputs of make_batch are forward's arguments: a tensor, a tuple by position, or a dict by keyword"
STATIC = "every size in the graph is a number that is known before training"
DATA_DEPENDENT = r"GuardOnDataDependentSymNode"


@dataclass(frozen=True, slots=True)
class Cause:
    """One kind of failure: a pattern of "ErrorType: message", one of the lines shown, and what is said.

    {1}, {2}, … in the three texts are the groups of `pattern`. `shown` says which line is to blame: those of the
    traceback, the signature of forward, or its last return.
    """

    pattern: str
    got: str
    rule: str
    remedy: str
    where: str = ""
    shown: Literal["traceback", "signature", "return"] = "traceback"


CAUSES = (
    Cause(
        DATA_DEPENDENT,
        "a mask is compared with the causal one",
        ONE_GRAPH,
        "say what the mask is: tgt_is_causal=True beside a causal tgt_mask (src_is_causal and memory_is_causal for the"
        " others, is_causal in an encoder), False beside any other",
        where=r"^torch/nn/modules/transformer\.py.*causal",
    ),
    Cause(
        DATA_DEPENDENT,
        "the Hugging Face model decides by the values of a tensor",
        ONE_GRAPH,
        'build it with use_cache=False and attn_implementation="eager", and leave masks of padding out of make_batch;'
        " where the line shown branches all the same, the model needs a change there",
        where=r"^transformers/",
    ),
    Cause(
        DATA_DEPENDENT,
        "an assertion looks at the values of a tensor",
        ONE_GRAPH,
        "remove the assertion from forward, or check the batch in make_batch",
        where=r": assert\b",
    ),
    Cause(
        DATA_DEPENDENT + r".*(?:Size-like symbols: \w*u\d)",
        "a decision depends on a shape that depends on the values of a tensor (nonzero, unique, a mask as an index)",
        STATIC,
        "keep shapes static: multiply by the mask, or use torch.where(mask, x, 0), instead of selecting rows",
    ),
    Cause(
        DATA_DEPENDENT + r".*specialized integer",
        "a Python number is taken from a tensor (.item(), int(), range()) and used as a size or a count",
        STATIC,
        "keep shapes static: take the number from the configuration or from a shape, not from a tensor's values",
    ),
    Cause(
        DATA_DEPENDENT,
        "a branch (if, while, and, or) is taken by the value of a tensor",
        ONE_GRAPH,
        "compute both sides and choose with torch.where(condition, a, b); branch on the configuration only",
    ),
    Cause(
        r"UnsupportedOperatorException: aten\._nested|not tracked with proxy",
        "forward makes a nested tensor",
        STATIC,
        "use a padded tensor and a mask",
        where="nested",
    ),
    Cause(
        r"not tracked with proxy|fake tensor in the exported program",
        "forward uses a tensor that was kept from an earlier call as a side effect",
        "the graph is made of inputs, parameters, buffers and what forward computes from them",
        "make the tensor in forward, or register it: self.register_buffer(name, tensor)",
    ),
    Cause(
        r"UnsupportedOperatorException: (\w+)\.(\w+)",
        "operator {1}::{2} cannot be traced: it has no fake implementation",
        "an operator in the graph says the shapes of its results without computing them",
        'register one: @torch.library.register_fake("{1}::{2}"), or use operators of torch',
    ),
    Cause(
        r"Found <class '[\w.<>]*?(\w*Cache)'>",
        "forward returns a cache of keys and values, {1}",
        "training has no use for a cache, and only tensors can be sent from stage to stage",
        "set use_cache=False in the model's configuration",
        shown="return",
    ),
    Cause(
        r"Unsupported input type <class '[\w.<>]*?(\w*Cache)'>",
        "forward gets a cache of keys and values, {1}",
        "training has no use for a cache, and only tensors can be sent from stage to stage",
        "leave it out of the inputs of make_batch, and set use_cache=False in the model's configuration",
        shown="signature",
    ),
    Cause(
        r"Found <class '(?:[\w.<>]*\.)?(\w+)'> in output",
        "forward returns a {1}, which torch cannot take apart into tensors",
        "forward returns tensors, or tuples, lists, dicts and registered dataclasses of them (return_dict=True)",
        "return one of these, or register the class: torch.export.register_dataclass({1})",
        shown="return",
    ),
    Cause(
        r"Unsupported input type <class '(?:[\w.<>]*\.)?(\w+)'>",
        "forward gets a {1}, which torch cannot take apart into tensors",
        ARGUMENTS,
        "pass its tensors instead, or register the class: torch.export.register_dataclass({1})",
        shown="signature",
    ),
    Cause(
        r"TypeError: missing a required argument: '(\w+)'",
        "forward requires {1}, which the inputs of make_batch do not hold",
        ARGUMENTS,
        "add {1} to the inputs that make_batch returns",
        shown="signature",
    ),
    Cause(
        r"TypeError: got an unexpected keyword argument '(\w+)'",
        "the inputs of make_batch hold {1}, which forward does not take",
        ARGUMENTS,
        "leave {1} out of the inputs, or name it as forward does",
        shown="signature",
    ),
    Cause(
        r"TypeError: too many positional arguments",
        "make_batch returns more inputs than forward takes",
        ARGUMENTS,
        "return (inputs, targets); several inputs are a tuple of their own",
        shown="signature",
    ),
    Cause(
        r"(?:ModuleNotFoundError|ImportError): (?:No module named '([\w.]+)')?",
        "forward imports a package that is missing: {0}",
        "what forward needs is installed where it runs",
        'install it, or choose an implementation without it, such as attn_implementation="eager"',
    ),
    Cause(
        r"uninitialized parameter",
        "the model has parameters without a shape (LazyLinear and the like)",
        STATIC,
        "run one batch through the model in build_model, or use the module that is not lazy",
        shown="signature",
    ),
    Cause(
        r"FakeTensor|has a non-zero number of elements",
        "a packed sequence is made of lengths in a tensor",
        STATIC,
        "give the recurrent module the padded batch",
        where=r"pack_padded_sequence|^torch/nn/modules/rnn\.py",
    ),
    Cause(
        r"data is not allocated|tensor subclasses|FakeTensor|[Cc]annot access data pointer",
        "forward takes the values of a tensor out of torch (numpy, a Python number, text, a pointer)",
        ONE_GRAPH,
        "use torch's own functions on tensors (torch.stack instead of torch.tensor for a list of tensors), and keep"
        " logging out of forward",
    ),
)


def explain_export(error: Exception, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TraceError:
    """The failure `error` of torch.export on `model` as an error for its author. Runs the model where that helps."""
    name = type(model).__name__
    text = f"{type(error).__name__}: {error}"
    frames = error_frames(error)
    if scripted := [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]:
        return TraceError(
            f"{name} cannot be exported as one graph: {scripted[0] or 'it'} is a TorchScript module",
            "torch.export traces Python code",
            "use the module that it was scripted from",
            frames,
        )
    for cause in CAUSES:
        match = re.search(cause.pattern, text, re.DOTALL)
        if match and (not cause.where or any(re.search(cause.where, frame) for frame in frames)):
            return _say(cause, match, model, frames, _first_line(error))
    eager = _eager_failure(model, args, kwargs)
    if eager is not None:
        return TraceError(
            f"{name} fails on the batch of make_batch: {type(eager).__name__}: {_first_line(eager)}",
            "forward runs on one microbatch",
            "correct the line shown",
            error_frames(eager),
        )
    return TraceError(
        f"torch.export fails on {name}, which runs by itself: {type(error).__name__}: {_first_line(error)}",
        "torch.export must see forward as one graph with static shapes",
        "see the traceback with --debug; a newer torch may export it, else simplify the line shown or report it to"
        " PyTorch",
        frames or forward_frame(model),
    )


def _say(cause: Cause, match: re.Match[str], model: nn.Module, frames: tuple[str, ...], message: str) -> TraceError:
    groups = (match.group(1) if match.re.groups and match.group(1) else message, *match.groups(""))
    got, rule, remedy = (text.format(*groups) for text in (cause.got, cause.rule, cause.remedy))
    if cause.shown != "traceback" or not frames:
        frames = forward_frame(model, last_return=cause.shown == "return")
    return TraceError(f"{type(model).__name__} cannot be exported as one graph: {got}", rule, remedy, frames)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "(no message)"


def _eager_failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        return error
    return None


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Hide what torch warns, logs and prints about a trace (of a failure, the whole graph); not with --debug."""
    if os.environ.get(DEBUG) or os.environ.get("TORCH_LOGS"):
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
