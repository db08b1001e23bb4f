"""Models that cannot be traced, one of each kind: the error names the user's line (marked `# here`) and the remedy."""

import copy
import re

import pytest
import torch
from torch import nn

from planner.errors import TraceError
from planner.tracing.exporting import trace_model
from planner.tracing.loading import build, load_source, make_batch
from tests.running import command, plan_at

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0


class BranchOnValue(Base):
    def forward(self, x):
        if x.sum() > 0:  # here
            return self.linear(x)
        return x


class BranchOnItem(Base):
    def forward(self, x):
        y = self.linear(x)
        return y if y.mean().item() > 0 else -y  # here


class AssertsValues(Base):
    def forward(self, x):
        assert x.abs().max() < 100  # here
        return self.linear(x)


class ItemAsSize(Base):
    def forward(self, x):
        length = int(x.abs().sum().item())  # here
        return self.linear(x)[:length]


class LoopsOverValue(Base):
    def forward(self, x):
        for _ in range(x.long().abs().max()):  # here
            x = self.linear(x)
        return x


class BranchOnNonzero(Base):
    def forward(self, x):
        found = torch.nonzero(x)
        return self.linear(x) if found.shape[0] > 2 else x  # here


class SelectsRows(Base):
    def forward(self, x):
        return self.linear(x[x.sum(1) > 0])  # here


class UsesNumpy(Base):
    def forward(self, x):
        return self.linear(torch.from_numpy(x.numpy() * 2))  # here


class WritesLog(Base):
    def forward(self, x):
        text = f"{x.sum():.2f}"  # here
        return self.linear(x) * len(text)


class ListOfTensors(Base):
    def forward(self, x):
        return self.linear(x) + torch.tensor([x[0, 0], x[0, 1], 1.0, 2.0])  # here


class CountsInPython(Base):
    def forward(self, x):
        self.calls += 1  # here
        return self.linear(x) * self.calls


class Answer:
    def __init__(self, value):
        self.value = value


class ReturnsObject(Base):
    def forward(self, x):
        return Answer(self.linear(x))  # here


class ReturnsNumber(Base):
    def forward(self, x):
        return self.linear(x), x.sum().item()  # here


class ReturnsNothing(Base):
    def forward(self, x):  # here
        self.linear(x)


class TakesObject(Base):
    def forward(self, answer):  # here
        return self.linear(answer.value)


class TakesTwo(Base):
    def forward(self, x, mask):  # here
        return self.linear(x) * mask


class WritesToInput(Base):
    def forward(self, x, y):
        x = x.add_(1)  # here
        return self.linear(x) + y


class ImportsMissing(Base):
    def forward(self, x):
        import flash_attn  # here

        return flash_attn.run(self.linear(x))


class DynamicCache:
    """Named as the class of transformers, which returns one where use_cache is on."""


class ReturnsCache(Base):
    def forward(self, x):
        return self.linear(x), DynamicCache()  # here


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(4)

    def forward(self, x):  # here
        return self.linear(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
        return self.lstm(packed)[1][0]  # here


class MaskedTransformer(nn.Module):
    says_causal: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16)

    def forward(self, source, target):
        mask = self.transformer.generate_square_subsequent_mask(7)
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=self.says_causal)  # here


class CausalTransformer(MaskedTransformer):
    says_causal = True


class NestedTensor(Base):
    def forward(self, x):
        rows = torch.nested.nested_tensor([x[0], x[1, :2]])  # here
        return self.linear(rows.to_padded_tensor(0.0))


class UnknownOperator(Base):
    def forward(self, x):
        return torch.ops.evenstage_tests.opaque(self.linear(x))  # here


class Conditional(Base):
    def forward(self, x):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.linear(x),))  # here


class WrongShape(Base):
    def forward(self, x):
        return self.linear(x.view(3, 3))  # here


LIBRARY = torch.library.Library("evenstage_tests", "DEF")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", lambda x: x.clone(), "CPU")

SENTENCES = (torch.randn(7, 2, 8), torch.randn(7, 2, 8))
CASES = [
    (BranchOnValue, (X,), "branch", r"torch\.where"),
    (BranchOnItem, (X,), "branch", r"torch\.where"),
    (AssertsValues, (X,), "assertion", r"remove the assertion"),
    (ItemAsSize, (X,), "Python number", r"static"),
    (LoopsOverValue, (X,), "Python number", r"static"),
    (BranchOnNonzero, (X,), "shape that depends", r"static"),
    (SelectsRows, (X,), "shape that depends", r"torch\.where\(mask"),
    (UsesNumpy, (X,), "out of torch", r"torch's own functions"),
    (WritesLog, (X,), "out of torch", r"logging"),
    (ListOfTensors, (X,), "out of torch", r"torch\.stack"),
    (CountsInPython, (X,), r"self\.calls", r'register_buffer\("calls"'),
    (ReturnsObject, (X,), "returns a Answer", r"register_dataclass\(Answer\)"),
    (ReturnsNumber, (X,), "returns a Python number", r"return_dict=True"),
    (ReturnsNothing, (X,), "returns nothing", r"return"),
    (TakesObject, (Answer(X),), "gets a Answer", r"register_dataclass\(Answer\)"),
    (TakesTwo, (X,), "requires mask", r"add mask"),
    (WritesToInput, (X, X), "shares its memory", r"clone\(\)"),
    (ImportsMissing, (X,), "flash_attn", r'attn_implementation="eager"'),
    (ReturnsCache, (X,), "DynamicCache", r"use_cache=False"),
    (Lazy, (X,), "without a shape", r"build_model"),
    (Recurrent, (torch.randn(5, 2, 4), torch.tensor([5, 3])), "packed", r"padded"),
    (MaskedTransformer, SENTENCES, "mask", r"tgt_is_causal=True"),
    (NestedTensor, (X,), "nested", r"padded"),
    (UnknownOperator, (X,), "evenstage_tests::opaque", r'register_fake\("evenstage_tests::opaque"\)'),
    (Conditional, (X,), "cond", r"torch\.where"),
    (WrongShape, (X,), "fails on the batch", r"correct the line"),
]


@pytest.mark.parametrize(("model", "inputs", "got", "remedy"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_line_and_the_remedy_are_named(model, inputs, got, remedy):
    inputs = tuple(inputs) if model is WritesToInput else copy.deepcopy(inputs)
    with pytest.raises(TraceError) as raised:
        trace_model(model(), inputs, {})
    error = raised.value
    assert re.search(got, error.got)
    assert re.search(remedy, error.remedy)
    assert error.rule
    blamed = [frame for frame in error.frames if re.fullmatch(r"test_explaining\.py:\d+: .*", frame)]
    assert len(blamed) == 1, error.frames
    line = int(blamed[0].split(":")[1])
    with open(__file__, encoding="utf-8") as file:
        assert file.readlines()[line - 1].rstrip().endswith("# here")


def test_a_tensor_that_is_kept_from_an_earlier_call_is_named():
    kept = []

    class KeepsTensor(Base):
        def forward(self, x):
            kept.append(self.linear(x))
            return kept[0] + kept[-1]

    trace_model(KeepsTensor(), (X,), {})
    with pytest.raises(TraceError, match="kept from an earlier call") as raised:
        trace_model(KeepsTensor(), (X,), {})
    assert "register_buffer" in raised.value.remedy
    assert raised.value.frames[0].endswith("def forward(self, x):")


def test_an_unknown_keyword_is_named():
    with pytest.raises(TraceError, match=r"hold extra, which forward does not take"):
        trace_model(WrongShape(), (X,), {"extra": X})


def test_a_scripted_module_is_named(recwarn):
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(TraceError, match=r"1 is a TorchScript module"):
        trace_model(model, (X,), {})


def test_a_failure_of_torch_alone_is_called_so(monkeypatch):
    def fails(*_: object) -> None:
        raise AssertionError("internal state is odd\nmore")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(
        TraceError, match=r"(?s)torch\.export fails on Sequential, which runs by itself: .*is odd"
    ) as raised:
        trace_model(nn.Sequential(nn.Linear(4, 4)), (X,), {})
    assert "--debug" in raised.value.remedy and "more" not in raised.value.got


def test_the_remedy_for_masks_is_one():
    assert len(trace_model(CausalTransformer(), SENTENCES, {}).layers) > 1


class CountsIdly(Base):
    def forward(self, x):
        self.calls += 1
        return self.linear(x)


class CachesLength(Base):
    def forward(self, x):
        self.calls = max(self.calls, x.shape[1])
        return self.linear(x) * self.calls


@pytest.mark.parametrize("model", [CountsIdly, CachesLength])
def test_a_number_that_changes_no_result_or_only_once_is_allowed(model):
    built = model()
    assert trace_model(built, (X,), {}).layers
    assert built.calls == 0


def test_no_cut_crosses_rows_that_are_chosen_by_value_and_the_model_trains_as_it_is(tmp_path, models):
    plan = plan_at(models / "chosen_rows.py", 2)
    source = load_source(str(models / "chosen_rows.py"))
    trace = trace_model(build(source, 0), (make_batch(source, 0, 0, 8)[0],), {})
    assert "chosen" not in [layer.id for layer in trace.layers]
    assert all(isinstance(tensor.num_bytes, int) for tensor in trace.tensors)
    plan.save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 2, "--check", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_a_view_whose_strides_depend_on_values_is_no_place_for_a_cut():
    class LastRows(Base):
        def forward(self, x):
            y = self.linear(x)
            kept = y[(x > -100).all(1)].view(2, -1, 4)[:, -1, :]
            return self.linear(kept)

    trace = trace_model(LastRows(), (torch.randn(8, 4),), {})
    assert all(isinstance(tensor.num_bytes, int) for tensor in trace.tensors)


MODEL_FILE = """
import torch
from torch import nn

class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, source, target):
        mask = self.transformer.generate_square_subsequent_mask(7)
        return self.transformer(source, target, tgt_mask=mask)

def build_model():
    return Translator()

def make_batch(n):
    return (torch.randn(n, 7, 8), torch.randn(n, 7, 8)), torch.randn(n, 7, 8)

def loss_fn(output, targets):
    return nn.functional.mse_loss(output, targets)
"""


def test_the_command_says_it_in_five_lines(tmp_path):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    ended = command("--gpus", 2, "model.py", "--batch-size", 4, module="planner", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 5, ended.stderr
    assert lines[0].startswith("plan: error: Translator cannot be exported")
    assert lines[1] == "  model.py:12: return self.transformer(source, target, tgt_mask=mask)"
    assert "tgt_is_causal=True" in lines[-1]


def test_debug_shows_what_torch_says(tmp_path):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    ended = command("--gpus", 2, "model.py", "--batch-size", 4, "--debug", module="planner", cwd=tmp_path)
    assert "GuardOnDataDependentSymNode" in ended.stderr and "Traceback" in ended.stderr
