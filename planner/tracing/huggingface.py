"""A Hugging Face configuration → ModelSource: the model, its batches and its loss, without a model file.

Only the local JSON is read; nothing is looked up or downloaded. The weights are fresh, by the seed rule. The functions
are those of a model file, so that everything after it is the same. `file` of the source is the configuration, and
`entry` is "hf" or, with sequences, "hf_" and their length.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import ModelFileError
from planner.tracing.huggingface_kinds import KINDS, Kind
from planner.tracing.loading import ModelSource, default_optimizer

if TYPE_CHECKING:
    import torch

DEFAULT_SEQUENCE_LENGTH = 128
# Models whose positions begin behind the padding token's id, so that so many fewer are of use.
COUNTS_FROM_PADDING = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "longformer"),
    *("data2vec-text", "ibert", "luke", "mpnet", "esm"),
)


def load_huggingface(file: Path, entry: str) -> ModelSource:
    """The source that `file`, a config.json, and `entry` describe.

    Raises ModelFileError where transformers is missing, the file is no configuration, its model type is unknown, or
    the model is of a kind without a loss.
    """
    data = _read(file)
    transformers = _transformers()
    config = _configuration(transformers, file, data)
    model_class, kind = _choose(transformers, file, config)
    length = _sequence_length(file, entry, kind, config)

    def build_model() -> torch.nn.Module:
        model: torch.nn.Module = model_class(config)
        return model.train()

    def reference_loss() -> tuple[float, str]:
        return math.log(kind.choices(config)), "a uniform guess"

    return ModelSource(
        file=file,
        entry=f"hf_{length}" if kind.length else "hf",
        build_model=build_model,
        make_batch=lambda batch_size: kind.make_batch(config, batch_size, length),
        loss_fn=kind.loss,
        make_optimizer=default_optimizer,
        batches=None,
        reference_loss=reference_loss,
        batch_size=None,
        loss_reduction="mean",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        rule = "it is the config.json of a model"
        raise ModelFileError(f"{file.name} is not JSON: {error}", rule, "check the path") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        rule = 'a configuration is an object that says its model_type, for example "gpt2"'
        raise ModelFileError(f"{file.name} has no model_type", rule, "give the config.json of a model")
    return data


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise ModelFileError(
            f"a Hugging Face configuration, and {error}",
            "the model's class is in the package transformers",
            "pip install 'evenstage[huggingface]'",
        ) from None
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers


def _configuration(transformers: Any, file: Path, data: dict[str, Any]) -> Any:
    """The configuration, without a cache, in fp32."""
    known = transformers.CONFIG_MAPPING
    kind = data["model_type"]
    if kind not in known:
        near = difflib.get_close_matches(kind, list(known.keys()), n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "write a model file around the model's own code instead"
        rule = f"the model type is one that transformers {transformers.__version__} knows"
        raise ModelFileError(f"{file.name}: unknown model_type {kind!r}", rule, remedy)
    try:
        config = known[kind].from_dict(data)
    except Exception as error:
        text = f"{file.name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise ModelFileError(text, f"transformers accepts the configuration of a {kind}", "correct it") from error
    config.dtype = "float32"
    for part in [config, *(getattr(config, name) for name in getattr(config, "sub_configs", ()))]:
        if getattr(part, "use_cache", False):
            part.use_cache = False
    return config


def _choose(transformers: Any, file: Path, config: Any) -> tuple[Any, Kind]:
    """The model's class and kind: by `architectures`, else the first kind that the model type has a class for."""
    named = (config.architectures or [""])[0]
    possible = [kind for kind in KINDS if all(getattr(config, name, None) for name in kind.needs)]
    if not named:
        for kind in possible:
            mapping = getattr(transformers, kind.auto_class)._model_mapping
            if type(config) in mapping:
                found = mapping[type(config)]
                return (found[0] if isinstance(found, tuple) else found), kind
    for kind in possible:
        if named.endswith(kind.endings) and hasattr(transformers, named):
            return getattr(transformers, named), kind
    raise ModelFileError(
        f"{file.name}: no loss is known for {named or f'a {config.model_type}'}",
        f"the kinds are {', '.join(kind.name for kind in KINDS)}",
        'name a class with a head, such as "architectures": ["BertForMaskedLM"], or write a model file with a loss_fn',
    )


def _sequence_length(file: Path, entry: str, kind: Kind, config: Any) -> int:
    """The length that `entry` asks for, else 128 or what the model has positions for."""
    asked = entry.removeprefix("hf").removeprefix("_")
    if asked and not kind.length:
        rule = "the inputs of such a model are no sequences of tokens"
        raise ModelFileError(f"{file.name}: a sequence length for {kind.name}", rule, "leave out --sequence-length")
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    limit = min((value for value in limits if isinstance(value, int) and value > 0), default=None)
    if limit is not None and config.model_type in COUNTS_FROM_PADDING:
        limit -= (config.pad_token_id or 0) + 1
    length = int(asked) if asked else min(DEFAULT_SEQUENCE_LENGTH, limit or DEFAULT_SEQUENCE_LENGTH)
    if limit is not None and length > limit:
        got = f"{file.name}: sequences of {length}"
        raise ModelFileError(got, f"the model has {limit} positions", f"use --sequence-length {limit} or less")
    return length
