"""Every evaluation ends with what was evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.everyday_projects import PROJECTS
from helpers.networks import SmallNet, trainer
from lightning_quant.nn import swap
from lightning_quant.nn.structure import strip
from lightning_quant.nn.what_ran import WhatRan, quantized_share
from lightning_quant.quantizers import FixedQuantizer

SHARES = {
    "int4_training": "quantized, W4A4, 4 of 4 layers",
    "igq_vit": "quantized, W4A4, ",
    "accuquant": "quantized, ",
}


@pytest.mark.parametrize("name", list(PROJECTS))
def test_of_several_callbacks_one_says_once_how_far(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = PROJECTS[name].fitted_and_tested(tmp_path, WhatRan())
    said = [line for line in caplog.messages if line.startswith("Tested ")]
    assert said == [f"Tested {quantized_share(module)}."]
    assert said[0].startswith(f"Tested {SHARES[name]}")


def test_a_float_network_is_said_to_be_one_after_each_verb(caplog: pytest.LogCaptureFixture) -> None:
    run, module = trainer(WhatRan()), SmallNet()
    run.fit(module)
    run.validate(module, verbose=False)
    run.test(module, verbose=False)
    said = [line for line in caplog.messages if line.endswith(" in float.")]
    assert said == ["Validated in float.", "Tested in float."]


def test_layers_of_other_bits_and_without_ranges_are_counted() -> None:
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    for at, bits in ((0, 4), (1, 4), (2, 8), (3, 4)):
        layer = swap(network[at], FixedQuantizer(bits), FixedQuantizer(bits))
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if at < 3:
                assert quantizer is not None
                quantizer.initialize(torch.randn(8))
    assert quantized_share(network) == "quantized, W4A4, 3 of 5 layers, 1 of them W8A8"
    assert quantized_share(strip(network)) == "in float"
