"""Encoders of transformers: one of every architecture in the library's own registries, small, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as registry
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

from bench.coverage.subject import Subject
from bench.coverage.transformers_inputs import BY_FAMILY, BY_NAME
from bench.coverage.transformers_options import ALL_LAYERS, CLASSES, LEFT_OUT, MORE, OPTIONS, SMALL, TOWERS

_REGISTRIES = (
    "IMAGE",
    "IMAGE_CLASSIFICATION",
    "BACKBONE",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "MASKED_LM",
    "TEXT_ENCODING",
)


def families() -> list[str]:
    """The model types of encoders: those with an encoder's head in a registry, and the towers of larger models."""
    listed = {name for task in _REGISTRIES for name in getattr(registry, f"MODEL_FOR_{task}_MAPPING_NAMES")}
    towers = {name for name in CONFIG_MAPPING_NAMES if any(part in name for part in TOWERS)}
    return sorted(((listed | towers) & set(CONFIG_MAPPING_NAMES) | set(MORE)) - set(LEFT_OUT))


def subjects() -> Iterator[Subject]:
    """One subject for each family, in the order of their names."""
    for family in families():
        make = partial(inputs, family)
        constant = ("grid_thw",) if "grid_thw" in make(1) else ()
        yield Subject("transformers", family, class_name(family), partial(build, family), make, constant)
    for family in ALL_LAYERS:
        name = f"{class_name(family)}, output_hidden_states"
        yield Subject("transformers", family, name, partial(build, family), partial(inputs, family, all_layers=True))


def class_name(family: str) -> str:
    """The name of `model_class`, without importing the model where a registry knows it."""
    name = CLASSES.get(family) or registry.MODEL_MAPPING_NAMES.get(family)
    return name if isinstance(name, str) else model_class(family).__name__


def model_class(family: str) -> type[PreTrainedModel]:
    """The class that stands for a model type: the one that AutoModel makes, or the tower with its config."""
    package = "transformers.models." + model_type_to_module_name(family)
    config = CONFIG_MAPPING[family]
    module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    name = CLASSES.get(family) or registry.MODEL_MAPPING_NAMES.get(family)
    if isinstance(name, str):
        found: type[PreTrainedModel] = getattr(module, name)
        return found
    fitting = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__module__.startswith(package)
        and c.config_class is config
        and not c.__name__.endswith(("PreTrainedModel", "PretrainedModel"))
    ]
    return sorted(fitting, key=lambda c: (not c.__name__.endswith("Model"), not c.__name__.endswith("Backbone")))[0]


def build(family: str) -> nn.Module:
    """The model of a family, small, in eval mode."""
    model = model_class(family)._from_config(configure(family))
    return model.eval()


def configure(family: str) -> Any:
    """Its config: the sizes of `SMALL` that the config knows, and the family's own options."""
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    known = {name: value for name, value in SMALL.items() if type(default.get(name)) is type(value)}
    return kind(**{**known, **OPTIONS.get(family, {})})


def inputs(family: str, batch: int, all_layers: bool = False) -> Mapping[str, Any]:
    """Inputs for `batch` samples, the same every time."""
    make = BY_FAMILY.get(family) or BY_NAME[model_class(family).main_input_name]
    return {**make(batch), "output_hidden_states": True} if all_layers else make(batch)
