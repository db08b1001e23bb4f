"""Hugging Face models from a configuration alone: class, batches, loss; planned and trained as the unsplit model."""

import dataclasses
import json
import math
import sys

import pytest
import torch

from planner.cli import main
from planner.errors import ModelFileError
from planner.files.plan_file import Plan
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call, build, load_source, make_batch, rows
from runner.verdict import plan_command
from tests.running import command
from tests.sample_values import sample_plan

pytest.importorskip("transformers")

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 61,
    "max_position_embeddings": 40,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 61,
    "n_positions": 40,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": True,
    "dtype": "bfloat16",
}
BERT = {"model_type": "bert", **TINY}
ROBERTA = {"model_type": "roberta", "pad_token_id": 1, **TINY}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 61}
VIT = {"model_type": "vit", **TINY, "image_size": 16, "patch_size": 8, "num_labels": 5}
CLASSIFIER = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **TINY, "num_labels": 3}
WHISPER = {
    "model_type": "whisper",
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_source_positions": 12,
    "max_target_positions": 10,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}


def write(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "entry", "model", "guesses"),
    [
        (GPT2, "hf_40", "GPT2LMHeadModel", 61),
        (BERT, "hf_40", "BertForMaskedLM", 61),
        (ROBERTA, "hf_38", "RobertaForMaskedLM", 61),
        (T5, "hf_128", "T5ForConditionalGeneration", 61),
        (WHISPER, "hf_10", "WhisperForConditionalGeneration", 61),
        (VIT, "hf", "ViTForImageClassification", 5),
        (CLASSIFIER, "hf_40", "BertForSequenceClassification", 3),
    ],
    ids=["gpt2", "bert", "roberta", "t5", "whisper", "vit", "classifier"],
)
def test_a_configuration_gives_a_model_that_traces_and_a_loss_near_a_guess(tmp_path, config, entry, model, guesses):
    source = load_source(str(write(tmp_path / "tiny", config)))
    assert (source.entry, source.name) == (entry, "tiny")
    built = build(source, 0)
    assert type(built).__name__ == model and built.training
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    inputs, targets = make_batch(source, 0, 0, 4)
    output = built(**inputs)
    assert source.reference_loss() == (pytest.approx(math.log(guesses)), "a uniform guess")
    assert source.loss_fn(output, targets).item() == pytest.approx(math.log(guesses), rel=0.35)
    halves = [source.loss_fn(_rows(output, k, k + 2), targets[k : k + 2]) for k in (0, 2)]
    assert torch.stack(halves).mean().item() == pytest.approx(source.loss_fn(output, targets).item(), rel=1e-5)
    assert len(trace_model(built, *as_call(rows(inputs, 0, 2))).layers) > 4


def _rows(output, start, stop):
    return type(output)(logits=output.logits[start:stop])


def test_batches_follow_the_seed_rule_and_targets_are_the_next_tokens(tmp_path):
    source = load_source(f"{write(tmp_path, GPT2)}:hf_7")
    (inputs, targets), (again, _), (other, _) = (make_batch(source, 3, step, 4) for step in (0, 0, 1))
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    assert inputs["input_ids"].shape == targets.shape == (4, 7)
    assert torch.equal(inputs["input_ids"][:, 1:], targets[:, :-1])


def test_the_masked_tokens_are_the_targets(tmp_path):
    source = load_source(f"{write(tmp_path, BERT)}:hf_40")
    inputs, targets = make_batch(source, 0, 0, 4)
    chosen = targets != -100
    assert chosen.sum(1).tolist() == [6, 6, 6, 6]
    assert (inputs["input_ids"][chosen] != targets[chosen]).float().mean() > 0.5


@pytest.mark.parametrize("config", [GPT2, BERT], ids=["gpt2", "bert"])
def test_the_command_plans_and_trains_it_as_the_unsplit_model(tmp_path, config):
    write(tmp_path / "tiny", config)
    ended = command(
        *("--gpus", 2, "--hf", "tiny/config.json", "--sequence-length", 8, "--batch-size", 4, "--microbatches", 2),
        *("--train", "--check", "--steps", 2, "--run-dir", "run"),
        module="planner",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("tiny (config.json, sequences of 8) · ")
    plan = Plan.load(tmp_path / "tiny.plan.json")
    assert (plan.model.file, plan.model.entry, plan.model.name) == ("tiny/config.json", "hf_8", "tiny")
    measurement = json.loads((tmp_path / "run" / "measurement.json").read_text())
    check = measurement["check"]
    assert check["steps"] == 2 and check["dropout_disabled"]
    assert max(check["max_loss_difference"], check["max_gradient_difference"]) < 1e-5
    assert "a uniform guess 4.1" in ended.stdout


@pytest.mark.parametrize(
    ("text", "entry", "words"),
    [
        ("no json", "hf", "is not JSON"),
        ("[]", "hf", "has no model_type"),
        (json.dumps({"model_type": "gtp2"}), "hf", "did you mean 'gpt2'"),
        (json.dumps({**BERT, "architectures": ["BertModel"]}), "hf", "no loss is known for BertModel"),
        (json.dumps({**GPT2, "n_layer": "many"}), "hf", "transformers accepts"),
        (json.dumps(GPT2), "hf_41", "--sequence-length 40 or less"),
        (json.dumps(VIT), "hf_8", "leave out --sequence-length"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, text, entry, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelFileError) as raised:
        load_source(f"{path}:{entry}")
    assert words in str(raised.value) and raised.value.rule


def test_advice_names_the_configuration_and_the_length():
    plan = sample_plan()
    planned = dataclasses.replace(
        plan, model=dataclasses.replace(plan.model, file="my model/config.json", entry="hf_8")
    )
    assert " --hf 'my model/config.json' --sequence-length 8 --batch-size " in plan_command(planned)


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelFileError, match=r"evenstage\[huggingface\]"):
        load_source(str(write(tmp_path, GPT2)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["model.py", "--hf", "config.json"], "a model file and --hf"),
        (["model.py", "--sequence-length", "8"], "--sequence-length without --hf"),
        (["--hf", "gpt2"], "a configuration is a local JSON file"),
        (["--hf", "missing.json"], "missing.json is not a file"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main(["--gpus", "2", *flags]) == 2
    assert words in capsys.readouterr().err
