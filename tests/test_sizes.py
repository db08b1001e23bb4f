"""The graphs at several sizes that come from one export are those of an export at each size."""

from pathlib import Path

import pytest
import torch
from torch import nn

from planner.tracing.exporting import read_trace, trace_model
from planner.tracing.loading import as_call, build, load_source, make_batch, rows
from planner.tracing.sizes import Call, SizeExports
from tests.zoo.attempting import zoo_files

FILES = {file.stem: file for kind in ("huggingface", "plain") for file in zoo_files(kind)}
REFUSED = ("llama_with_cache", "transformer_mask_by_value")
ONE_EACH = {"bloom", "two_outputs_function"}
FAST = ["resnet", "inplace_on_keyword", "state_in_forward", "unused_keyword", "diffusion", "opt"]
SIZES = (4, 2, 1)


def compare(file: Path) -> int:
    """Compare all sizes of a model file, and return the number of exports that they took."""
    source = load_source(str(file))
    inputs, _ = make_batch(source, 0, 0, max(SIZES))

    def call(size: int) -> Call:
        return as_call(rows(inputs, 0, size))

    exports = SizeExports(build(source, 0), call, SIZES)
    for size in SIZES:
        model, other = build(source, 0), build(source, 0)
        found, expected = read_trace(exports.graph(size, model), model), trace_model(other, *call(size))
        assert found.fingerprint == expected.fingerprint, size
        assert found.layers == expected.layers and found.tied == expected.tied
        assert found.why_not_plain == expected.why_not_plain
        sent = [
            [(t.producer, t.consumers, t.num_bytes, t.gradient_bytes) for t in x.tensors] for x in (found, expected)
        ]
        assert sent[0] == sent[1]
    return exports.count.exports


@pytest.mark.parametrize("name", FAST)
def test_a_model_of_the_zoo_has_the_fingerprint_of_an_export_at_each_size(name: str) -> None:
    assert compare(FILES[name]) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in FILES if name not in REFUSED])
def test_every_model_of_the_zoo_has_the_fingerprint_of_an_export_at_each_size(name: str) -> None:
    assert compare(FILES[name]) <= (3 if name in ONE_EACH else 2)


class Squeezes(nn.Module):
    """Goes another way for a single sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.shape[0] == 1 else x.sigmoid()


class CountsSamples(nn.Module):
    """Repeats an operation once per sample, which fixes the size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(x.shape[0]):
            x = x.relu()
        return x


class Divides(nn.Module):
    """Computes with the size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(x.shape[0] * 3) / (x.shape[0] + 2)).view(-1, 3) * self.weight + torch.arange(
            x.shape[0] * 3
        ).view(x.shape[0], 3)


@pytest.mark.parametrize(("model", "num_exports"), [(Squeezes, 2), (CountsSamples, 3), (Divides, 1)])
def test_what_the_size_decides_is_exported_at_that_size(model: type[nn.Module], num_exports: int) -> None:
    exports = SizeExports(model(), lambda size: ((torch.ones(size, 3),), {}), SIZES)
    for size in SIZES:
        x = torch.rand(size, 3)
        graph = exports.graph(size, model())
        torch.testing.assert_close(graph(x), model()(x))
        expected = trace_model(model(), (x,), {}).fingerprint
        assert read_trace(graph, model()).fingerprint == expected
    assert exports.count.exports == num_exports


def test_the_graph_holds_the_tensors_of_the_model_that_it_is_asked_for() -> None:
    exports = SizeExports(nn.Linear(3, 2), lambda size: ((torch.ones(size, 3),), {}), SIZES)
    model = nn.Linear(3, 2)
    assert exports.graph(2, model).get_parameter("weight") is model.weight


def test_one_size_is_exported_as_it_is() -> None:
    exports = SizeExports(nn.Linear(3, 2), lambda size: ((torch.ones(size, 3),), {}), (4,))
    assert exports.symbolic is None
    exports.graph(4, nn.Linear(3, 2))
    assert exports.count.exports == 1
