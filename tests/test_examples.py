"""The examples: they load from anywhere, export in one graph, and learn from real text without looking ahead."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from planner.tracing.loading import ModelSource, as_call, build, load_source, make_batch

EXAMPLES = Path(__file__).parents[1] / "examples"
SEED = 0


@pytest.fixture(scope="module", params=["transformer", "gpt2"])
def source(request: pytest.FixtureRequest) -> ModelSource:
    if request.param == "gpt2":
        pytest.importorskip("transformers")
    return load_source(str(EXAMPLES / f"{request.param}.py"))


@pytest.fixture(scope="module")
def model(source: ModelSource) -> torch.nn.Module:
    return build(source, SEED)


@pytest.mark.parametrize("name", ["transformer", "gpt2"])
def test_an_example_loads_from_another_folder(name: str, tmp_path: Path) -> None:
    if name == "gpt2":
        pytest.importorskip("transformers")
    program = "import runpy, sys; runpy.run_path(sys.argv[1])['make_batch'](2)"
    path = EXAMPLES / f"{name}.py"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    subprocess.run([sys.executable, "-c", program, str(path)], cwd=tmp_path, env=environment, check=True)


def test_the_batch_depends_on_the_seed_alone(source: ModelSource) -> None:
    first, again, other = (make_batch(source, SEED, step, 4) for step in (7, 7, 8))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[1], other[1])


def test_targets_are_the_next_words(source: ModelSource) -> None:
    inputs, targets = make_batch(source, SEED, 0, source.batch_size)
    tokens = inputs["input_ids"] if isinstance(inputs, dict) else inputs
    assert tokens.shape == targets.shape == (16, 64)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert tokens.min() >= 0
    assert max(tokens.max(), targets.max()) < 10_000


def test_a_fresh_model_knows_nothing(source: ModelSource, model: torch.nn.Module) -> None:
    inputs, targets = make_batch(source, SEED, 0, 4)
    arguments, keywords = as_call(inputs)
    loss = source.loss_fn(model(*arguments, **keywords), targets)
    assert loss.item() == pytest.approx(math.log(10_000), rel=0.1)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_export_gives_the_same_logits(source: ModelSource, model: torch.nn.Module) -> None:
    arguments, keywords = as_call(make_batch(source, SEED, 0, 2)[0])
    exported = torch.export.export(model, arguments, keywords).module()
    with torch.no_grad():
        torch.testing.assert_close(_logits(exported(*arguments, **keywords)), _logits(model(*arguments, **keywords)))


def test_no_word_sees_those_after_it(source: ModelSource, model: torch.nn.Module) -> None:
    inputs, _ = make_batch(source, SEED, 0, 2)
    tokens = inputs["input_ids"] if isinstance(inputs, dict) else inputs
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 10_000
    with torch.no_grad():
        before, after = (
            _logits(model(input_ids=ids) if isinstance(inputs, dict) else model(ids)) for ids in (tokens, changed)
        )
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_the_transformer_has_the_sizes_it_claims() -> None:
    module = load_source(str(EXAMPLES / "transformer.py"))
    transformer = build(module, SEED)
    layer, head = (sum(p.numel() for p in part.parameters()) for part in (transformer.layers[0], transformer.output))
    assert len(transformer.layers) == 8
    assert 2.2 < head / layer < 2.7  # "as heavy as two layers and a half"


def test_the_head_of_gpt2_is_tied() -> None:
    pytest.importorskip("transformers")
    gpt2 = build(load_source(str(EXAMPLES / "gpt2.py")), SEED)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_training_beats_the_unigram_entropy() -> None:
    """A small one of the same kind gets there in seconds; the demo itself prints the whole model's loss."""
    source = load_source(str(EXAMPLES / "transformer.py"))
    arguments = sys.modules[source.build_model.__module__].ModelArgs(dim=64, n_layers=1)
    torch.set_num_threads(1)  # faster than two on a small model and a busy machine
    torch.manual_seed(SEED)
    model = sys.modules[source.build_model.__module__].Transformer(arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        inputs, targets = make_batch(source, SEED, step, 8)
        loss = source.loss_fn(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    entropy, _ = source.reference_loss()
    assert sum(losses[-10:]) / 10 < entropy


def test_text_is_split_into_words_by_frequency(stdlib_text: ModuleType) -> None:
    corpus = stdlib_text.build_corpus("if x1 == x1:\n", vocabulary_size=100)
    assert corpus.words == ("<unk>", "1", "=", "x", "\n", ":", "if")
    assert [corpus.words[token] for token in corpus.tokens] == ["if", "x", "1", "=", "=", "x", "1", ":", "\n"]


def test_rare_words_are_unknown(stdlib_text: ModuleType) -> None:
    corpus = stdlib_text.build_corpus("a a a b b c", vocabulary_size=2)
    assert corpus.words == ("<unk>", "a")
    assert corpus.tokens.tolist() == [1, 1, 1, 0, 0, 0]


def test_unigram_entropy_of_a_known_text(stdlib_text: ModuleType) -> None:
    halves_and_quarters = stdlib_text.build_corpus("a a b c")
    assert halves_and_quarters.unigram_entropy() == pytest.approx(1.5 * math.log(2))
    assert stdlib_text.build_corpus("a a a").unigram_entropy() == 0


def test_windows_stay_inside_the_text(stdlib_text: ModuleType) -> None:
    corpus = stdlib_text.build_corpus("a b c d")
    torch.manual_seed(0)
    inputs, targets = corpus.draw_windows(50, length=3)
    assert inputs.shape == targets.shape == (50, 3)
    assert set(map(tuple, torch.cat([inputs, targets[:, -1:]], 1).tolist())) == {tuple(corpus.tokens.tolist())}


def test_text_is_read_up_to_its_limit(stdlib_text: ModuleType, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.py", "b.py", "c.py")]
    for file in files:
        file.write_text("12345")
    assert stdlib_text.read_text(files, max_characters=7) == "1234512"


@pytest.fixture
def stdlib_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import stdlib_text

    return stdlib_text


def _logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits
