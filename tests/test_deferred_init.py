"""A build without memory gives bit by bit what the ordinary build gives, parameter by parameter, and leaves the
generators where the ordinary build leaves them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from planner.errors import TraceError, UsageError
from planner.tracing import deferred_init, init_replay
from planner.tracing.deferred_init import DeferredInit
from planner.tracing.deferred_model import build_deferred, build_either
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call, build, load_source, make_batch, rows

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def tensors(model):
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def assert_same(build_model, small_bytes=0, seed=3):
    """Build twice, ordinarily and deferred; all at once and one by one every tensor is the same."""
    torch.manual_seed(seed)
    expected, state = tensors(build_model()), torch.get_rng_state()
    torch.manual_seed(seed)
    with DeferredInit(small_bytes=small_bytes) as record:
        deferred = tensors(build_model())
    assert torch.equal(state, torch.get_rng_state())
    assert deferred.keys() == expected.keys()
    assert any(tensor.is_meta for tensor in deferred.values())
    together = dict(zip(deferred, record.values(list(deferred.values())), strict=True))
    for index, (name, tensor) in enumerate(expected.items()):
        alone = record.values([deferred[name]])[0] if index % 5 == 0 else together[name]
        for got in (together[name], alone):
            assert (got.dtype, got.size(), got.stride()) == (tensor.dtype, tensor.size(), tensor.stride()), name
            assert torch.equal(got, tensor), name
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("small_bytes", [0, 16 * 1024])
@pytest.mark.parametrize("example", ["transformer", "gpt2", "resnet", "encoder_decoder"])
def test_examples(example, small_bytes):
    assert_same(load_source(str(EXAMPLES / f"{example}.py")).build_model, small_bytes)


def orthogonal():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Conv2d(3, 4, 3))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return model


def truncated_normal():
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
    for layer in model:
        nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.03, b=0.03)
    return model


def sparse():
    model = nn.Linear(20, 30)
    nn.init.sparse_(model.weight, 0.3)
    return model


def initialised_again():
    """A later pass writes over what the constructors drew, in part through views and `.data`."""
    model = nn.Sequential(nn.Embedding(10, 6, padding_idx=0), nn.Linear(6, 8))

    def init(module):
        if isinstance(module, nn.Linear):
            module.weight.data[1:3].normal_(0, 0.5)
            module.weight.data = module.weight.data.t().contiguous().t()
            module.bias.data.zero_()

    model.apply(init)
    with torch.no_grad():
        model[0].weight /= 3.0
        model[1].weight += model[0].weight[:8]
    return model


def seeded_inside():
    """User code that seeds, forks and reads the generator, and has one of its own."""
    first = nn.Linear(6, 6)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        second = nn.Linear(6, 6)
    own = torch.Generator().manual_seed(4)
    third = torch.empty(6, 6).normal_(generator=own) + torch.randn(6, 6, generator=own)
    third = nn.Parameter(third + torch.randn(6, 6) + torch.rand(6, 6))
    model = nn.Sequential(first, second, nn.Linear(6, 6))
    model.register_parameter("third", third)
    torch.manual_seed(1)
    model.append(nn.Linear(6, 6))
    return model


def reads_values():
    """Stochastic depth as in vision transformers, and a branch on a random number."""
    rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Dropout(rate)) for rate in rates))
    if torch.rand(7, 7).sum() > 10:
        model.append(nn.Linear(5, 7))
    model.scale = nn.Parameter(torch.full((3, 3), model[0][0].weight.abs().max().item()))
    return model


def parametrized():
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(10, 12))
    return nn.Sequential(spectral, nn.utils.parametrizations.weight_norm(nn.Linear(12, 5)), nn.BatchNorm1d(5))


def converted():
    return nn.Sequential(nn.Linear(5, 6), nn.LSTM(6, 4, 2)).double().to("cpu").half().float()


def from_numbers():
    """Values that come from outside torch, and draws from probabilities."""
    model = nn.Linear(4, 4)
    model.register_buffer("table", torch.tensor([[1.0, 2.0], [3.0, 4.0]]) @ torch.ones(2, 3))
    model.register_buffer("mask", torch.bernoulli(torch.full((4, 4), 0.3)))
    model.register_buffer("order", torch.randperm(50), persistent=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(torch.arange(16.0).view(4, 4).numpy() * 2))
    return model


@pytest.mark.parametrize(
    "build_model",
    [
        orthogonal,
        truncated_normal,
        sparse,
        initialised_again,
        seeded_inside,
        reads_values,
        parametrized,
        converted,
        from_numbers,
        lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),  # clones layers by deepcopy
        lambda: nn.utils.skip_init(nn.Linear, 3, 4).apply(lambda m: m.reset_parameters()),
    ],
)
def test_initialisations(build_model):
    assert_same(build_model)


def test_meta_in_the_users_code_is_the_model_that_it_would_be_without():
    torch.manual_seed(3)
    expected = nn.Linear(5, 6).weight
    torch.manual_seed(3)
    with DeferredInit(small_bytes=0, meta_is_real=True) as record, torch.device("meta"):
        layer = nn.Linear(5, 6)
    assert torch.equal(record.values([layer.weight])[0], expected)


def test_ties_and_views_stay_one_storage():
    with DeferredInit(small_bytes=0) as record:
        weight = torch.randn(4, 6)
        half = weight[:2]
    whole, part = record.values([weight, half])
    part.fill_(5.0)
    assert whole[:2].eq(5.0).all() and not whole[2:].eq(5.0).any()


def test_a_weight_needs_its_own_operations_only():
    with DeferredInit(small_bytes=0) as record:
        layers = [nn.Linear(30, 30, bias=False) for _ in range(4)]
    chosen, _ = init_replay._needed(record.operations, {record._key(layers[2].weight)})
    assert len(chosen) == 2 and len(record.operations) == 8  # empty and uniform_


def test_a_constant_that_changes_after_it_was_read_is_refused():
    numbers = np.zeros((100, 100), dtype=np.float32)
    with DeferredInit(small_bytes=0) as record:
        weight = torch.empty(100, 100).copy_(torch.from_numpy(numbers))
        numbers[3] = 1.0
    with pytest.raises(TraceError, match="changed a tensor"):
        record.values([weight])


def model_file(tmp_path, body):
    text = f"import torch\nfrom torch import nn\ndef build_model():\n{body}\n"
    text += "def make_batch(n):\n    return torch.randn(n, 80), torch.randn(n, 80)\n"
    text += "def loss_fn(a, b):\n    return nn.functional.mse_loss(a, b)\n"
    (tmp_path / "model.py").write_text(text)
    return load_source(str(tmp_path / "model.py"))


@pytest.mark.parametrize("example", ["gpt2", "resnet"])
def test_the_trace_is_that_of_the_ordinary_model(example):
    source = load_source(str(EXAMPLES / f"{example}.py"))
    inputs, _ = make_batch(source, 0, 0, 4)
    arguments = as_call(rows(inputs, 0, 2))
    expected = trace_model(build(source, 0), *arguments)
    deferred = build_deferred(source, 0, draws=False)
    assert all(isinstance(t, torch._subclasses.FakeTensor) for t in tensors(deferred.model).values())
    got = trace_model(deferred.model, *arguments)
    assert (got.fingerprint, got.layers, got.tied) == (expected.fingerprint, expected.layers, expected.tied)


def test_values_by_name_without_draws_builds_again_with_them(tmp_path):
    source = model_file(tmp_path, "    return nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))")
    deferred = build_deferred(source, 5, draws=False)
    assert torch.equal(deferred.values(["1.weight"])["1.weight"], build(source, 5)[1].weight)


def test_a_model_built_on_the_meta_device_is_seen(tmp_path):
    body = "    with torch.device('meta'):\n        return nn.Sequential(nn.Linear(80, 80))"
    _, deferred = build_either(model_file(tmp_path, body), 0, meta=False, draws=True)
    assert deferred is not None and deferred.values(["0.weight"])["0.weight"].std() > 0
    assert build_either(model_file(tmp_path, "    return nn.Linear(80, 80)"), 0, meta=False)[1] is None


def test_a_model_of_fake_tensors_has_no_values(tmp_path):
    body = "    from torch._subclasses.fake_tensor import FakeTensorMode\n"
    body += "    with FakeTensorMode():\n        return nn.Sequential(nn.Linear(80, 80))"
    _, deferred = build_either(model_file(tmp_path, body), 0, meta=False, draws=True)
    with pytest.raises(UsageError, match=r"builds 0\.weight as a fake tensor"):
        deferred.values(["0.weight"])


def test_what_cannot_be_recorded_is_refused_by_name(tmp_path):
    body = "    model = nn.Linear(80, 80)\n    nowhere = torch.empty(80, 80, device='meta')\n"
    body += "    model.weight.data.copy_(nowhere)\n    return model"
    with pytest.raises(TraceError, match=r"aten\.copy_.* on the meta device"):
        build_deferred(model_file(tmp_path, body), 0, draws=True)
    with pytest.raises(TraceError, match="on cuda"):
        deferred_init._refuse_device(torch.ops.aten.empty.memory_format, ([2],), {"device": torch.device("cuda")})
