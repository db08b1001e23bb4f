"""The unsplit reference: the eager model trained beside the pipeline, and the comparison of the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from planner.errors import CheckError
from planner.files.measurement_file import CheckResult
from planner.files.plan_file import Plan
from planner.machine.device import Device
from planner.tracing.deferred_model import build_either
from planner.tracing.loading import ModelSource, as_call, on_device, rows
from planner.tracing.precision import autocast
from planner.tracing.randomness import DropoutAsIdentity
from planner.tracing.rewriting import canonical_names
from runner.initial_weights import initial_weights
from runner.weight_files import WeightFiles

TOLERANCES = {"fp32": 1e-5, "bf16": 2.0**-6}
SMALL_GRADIENT = 1e-3


def compute_exactly() -> None:
    """Let a GPU compute what a CPU does, for a comparison: by float32, and every time alike.

    cuDNN otherwise takes 10 of 23 bits of a convolution's factors, and the fastest algorithm of the moment.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@dataclass(slots=True)
class Worst:
    """The largest difference so far; and the largest in the first step that had one above the tolerance."""

    tolerance: float
    difference: float = 0.0
    name: str = ""
    first: tuple[int, float, str] | None = None

    def see(self, difference: float, name: str, step: int) -> None:
        """Take in `difference` of `name` at `step` (-1: before the first); NaN counts as infinite."""
        difference = float("inf") if difference != difference else difference
        if difference > self.difference or not self.name:
            self.difference, self.name = difference, name
        if difference > self.tolerance and (
            self.first is None or (self.first[0] == step and difference > self.first[1])
        ):
            self.first = (step, difference, name)


class Reference:
    """The eager model, trained on the same batches: one microbatch after the other, gradients summed, then divided."""

    def __init__(self, plan: Plan, source: ModelSource, device: Device, weights: WeightFiles | None = None) -> None:
        self.plan, self.source, self.device = plan, source, device.torch_device
        model, deferred = build_either(source, plan.seed, meta=False, draws=True)
        initial_weights(model, canonical_names(model), deferred, weights).give(model)
        self.model = model.to(device.torch_device)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.names = canonical_names(self.model)
        self.optimizer = source.make_optimizer(list(self.parameters.values()))
        self.tolerance = TOLERANCES[plan.precision]
        self.loss, self.gradient, self.parameter = (Worst(self.tolerance) for _ in range(3))
        self.steps = 0

    def backward(self, batch: tuple[Any, Any]) -> float:
        """Forward and backward of a whole batch; returns its loss. The optimizer does not step yet."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        size = self.plan.microbatch_size
        batch = on_device(batch, self.device)
        for start in range(0, self.plan.batch_size, size):
            args, kwargs = as_call(rows(batch[0], start, start + size))
            with DropoutAsIdentity(), autocast(self.plan.precision, self.device.type):
                output = self.model(*args, **kwargs)
                loss = self.source.loss_fn(output, rows(batch[1], start, start + size))
            loss.backward()
            losses.append(loss.detach().reshape(()))
        if self.source.loss_reduction == "sum":
            return float(torch.stack(losses).sum())
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(len(losses))
        return float(torch.stack(losses).mean())

    def compare_gradients(self, step: int, loss: float, own_loss: float, gradients: dict[str, Any]) -> None:
        """Hold this step's loss and gradients, by canonical name, against the reference's; then step the optimizer.

        Raises CheckError for a gradient that only one side has.
        """
        small = self._small_gradient()
        self.loss.see(abs(loss - own_loss), "the batch", step)
        for name, parameter in self.parameters.items():
            got = gradients.get(name)
            if parameter.grad is None and got is None:
                continue
            if got is None and parameter.grad is not None and float(parameter.grad.abs().max()) > 0:
                raise CheckError(
                    f"step {step}: no stage has a gradient for {name}",
                    "every trainable parameter gets the gradient of the unsplit model",
                    "report this model: the split lost a parameter",
                )
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.gradient.see(_difference(got, expected, small), name, step)
        self.optimizer.step()
        self.steps += 1

    def _small_gradient(self) -> float:
        """Below this, gradients are compared absolutely: 1 in fp32, in bf16 a thousandth of the largest of all.

        bf16 allows so much that an absolute difference would let any gradient pass that is small as a whole.
        """
        if self.plan.precision == "fp32":
            return 1.0
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None and p.grad.numel()]
        return SMALL_GRADIENT * max((float(gradient.abs().max()) for gradient in gradients), default=0.0)

    def compare_parameters(self, weights: dict[str, torch.Tensor], step: int) -> None:
        """Hold weights, by name in the model's state_dict, against the reference's (step -1: as they were built)."""
        for name, expected in self.model.state_dict().items():
            if name not in weights:
                raise CheckError(f"no stage has {name}", "every weight of the model is in one stage")
            self.parameter.see(_difference(weights[name], expected), name, step)

    def _rule(self) -> str:
        if self.plan.precision == "fp32":
            return f"differences stay within {self.tolerance:g} (relative above 1) in float32"
        return (
            f"differences from eager autocast stay within {self.tolerance:g}, four roundings to bfloat16 (gradients"
            " relative to their largest value, others above 1)"
        )

    def result(self, dropout_disabled: bool) -> CheckResult:
        """The largest differences. Raises CheckError, naming the parameter, where one exceeds the tolerance."""
        if not self.parameters or self.steps == 0:
            what = "no trainable parameters" if not self.parameters else "no steps"
            raise CheckError(f"there was nothing to compare: {what}", "a check compares at least one step", "--steps 1")
        kinds = {"weight": self.parameter, "gradient": self.gradient, "loss": self.loss}
        wrong = [(worst.first, kind) for kind, worst in kinds.items() if worst.first is not None]
        if wrong:
            (step, difference, name), kind = min(wrong, key=lambda entry: entry[0][0])
            others = [f"the {k} of {w.first[2]} by {w.first[1]:.3g}" for k, w in kinds.items() if w.first and k != kind]
            when = "before the first step" if step < 0 else f"at step {step}"
            raise CheckError(
                f"the split model is not the unsplit one: the {kind} of {name} differs by {difference:.3g} {when}"
                + (f" (also {', '.join(others)})" if others else ""),
                self._rule(),
                "do not trust this run; report the model",
            )
        return CheckResult(
            steps=self.steps,
            max_loss_difference=self.loss.difference,
            max_gradient_difference=self.gradient.difference,
            max_parameter_difference=self.parameter.difference,
            worst_parameter=self.parameter.name if self.parameter.difference > 0 else "",
            dropout_disabled=dropout_disabled,
        )


def _difference(got: torch.Tensor | None, expected: torch.Tensor, small: float = 1.0) -> float:
    """Largest absolute difference, relative to the largest finite expected value or to `small` where that is more."""
    if expected.numel() == 0:
        return 0.0
    reference = expected.detach().cpu().to(torch.float64)
    other = torch.zeros_like(reference) if got is None else got.detach().cpu().to(torch.float64)
    apart = torch.where(other == reference, 0.0, (other - reference).abs())
    finite = reference[reference.isfinite()].abs()
    scale = max(small, float(finite.max()) if finite.numel() else small)
    return float(apart.max()) / scale if scale else float(apart.max())
