"""The examples that are hard to cut: they export, leave room for cuts, carry what they say, and can be learned."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from planner.tracing.exporting import Trace, trace_model
from planner.tracing.loading import ModelSource, as_call, build, load_source, make_batch, rows
from planner.tracing.rewriting import compute_nodes

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["resnet", "unet", "encoder_decoder"]
SEED = 0


def source_of(name: str) -> ModelSource:
    return load_source(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Faster than two on small models and a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    found = {}
    for name in NAMES:
        source = source_of(name)
        inputs, _ = make_batch(source, SEED, 0, source.batch_size)
        found[name] = trace_model(build(source, SEED), *as_call(rows(inputs, 0, 4)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_exports_with_room_for_cuts(name: str, traces: dict[str, Trace]) -> None:
    assert len(traces[name].layers) - 1 >= 10


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_batches_depend_on_the_seed_alone(name: str) -> None:
    source = source_of(name)
    torch.testing.assert_close(build(source, SEED).state_dict(), build(source, SEED).state_dict(), rtol=0, atol=0)
    first, again, other = (make_batch(source, SEED, step, 4) for step in (7, 7, 8))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_batch_is_the_mean_of_its_microbatches_losses(name: str) -> None:
    """What a pipeline relies on; not so for a Dice over the batch, or a mean over words of sentences of any length."""
    source = source_of(name)
    inputs, targets = make_batch(source, SEED, 0, 8)
    arguments, keywords = as_call(inputs)
    with torch.no_grad():
        output = build(source, SEED)(*arguments, **keywords)
        parts = [source.loss_fn(output[start : start + 2], targets[start : start + 2]) for start in range(0, 8, 2)]
        torch.testing.assert_close(torch.stack(parts).mean(), source.loss_fn(output, targets))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    source = source_of(name)
    model = build(source, SEED)
    inputs, targets = make_batch(source, SEED, 0, 4)
    arguments, keywords = as_call(inputs)
    source.loss_fn(model(*arguments, **keywords), targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_steps"), [("resnet", 24), ("unet", 15), ("encoder_decoder", 110)])
def test_training_beats_the_reference(name: str, num_steps: int) -> None:
    source = source_of(name)
    model = build(source, SEED)
    optimizer = source.make_optimizer(list(model.parameters()))
    losses = []
    for step in range(num_steps):
        inputs, targets = make_batch(source, SEED, step, source.batch_size)
        arguments, keywords = as_call(inputs)
        loss = source.loss_fn(model(*arguments, **keywords), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    reference, _ = source.reference_loss()
    assert sum(losses[-5:]) / 5 < 0.95 * reference


def test_no_layer_begins_with_a_write_into_what_the_one_before_made(traces: dict[str, Trace]) -> None:
    for name in ("resnet", "unet"):
        nodes = compute_nodes(traces[name].graph_module.graph)
        assert any("relu_" in str(node.target) for node in nodes)
        assert any(".norm1" in layer.id for layer in traces[name].layers)
        assert not any("relu_" in str(nodes[layer.start].target) for layer in traces[name].layers)


def readers_of(trace: Trace, producer: str) -> list[str]:
    """The layers that read what `producer` makes, where there are several."""
    ids = [layer.id for layer in trace.layers]
    return [ids[c] for t in trace.tensors if ids[t.producer] == producer for c in t.consumers if len(t.consumers) > 1]


def test_the_skips_of_the_unet_are_nested(traces: dict[str, Trace]) -> None:
    """What is made first is read last: before the bottom all three are open."""
    for level, above in enumerate(("grow.2", "grow.1", "grow.0")):
        assert readers_of(traces["unet"], f"down.{level}.norm2") == [f"pool.{level}", above]


def test_every_decoder_layer_reads_the_encoder(traces: dict[str, Trace]) -> None:
    trace = traces["encoder_decoder"]
    assert readers_of(trace, "encoder_norm") == [f"decoder.{number}.multihead_attn" for number in range(4)]
    assert set(trace.tied) == {"words.weight", "places"}
