"""The settings of a calibration are the arguments of the callback."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from lightning_quant import AccuQuant, IGQViT
from lightning_quant.accuquant.settings import Settings as WindowSettings
from lightning_quant.igq_vit.settings import Settings as GroupSettings

METHODS = pytest.mark.parametrize(("callback", "settings"), [(AccuQuant, WindowSettings), (IGQViT, GroupSettings)])


@METHODS
def test_every_setting_is_an_argument_with_the_same_default(callback: Any, settings: Any) -> None:
    signature = inspect.signature(callback).parameters
    assert {field.name: field.default for field in fields(settings)}.items() <= {
        **{name: parameter.default for name, parameter in signature.items()}
    }.items()
    assert callback().settings == settings()


@METHODS
def test_arguments_reach_the_settings(callback: Any, settings: Any) -> None:
    assert callback(3, exclude="head").settings == settings(weight_bits=3, exclude=("head",))
    assert callback(seed=5, exclude=["a", "b"], cache_dir="states").settings == settings(seed=5, exclude=("a", "b"))
