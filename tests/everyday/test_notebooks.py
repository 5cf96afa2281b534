"""What a notebook shows is what a terminal does."""

from __future__ import annotations

import pytest
import rich.console

from helpers.networks import SmallNet
from helpers.small_diffusion import parts
from helpers.vits import calibration, images, vit
from lightning_quant import GradientQuantization


@pytest.mark.parametrize("method", ["int4_training", "igq_vit", "accuquant"])
def test_plans_are_whole_texts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook rich would show the table by itself, beside the text."""
    from lightning_quant.accuquant.plan import plan_denoiser
    from lightning_quant.accuquant.settings import Settings

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    match method:
        case "int4_training":
            text, name = str(GradientQuantization().plan(SmallNet())), "net.3"
        case "igq_vit":
            text, name = str(calibration(vit(), images(2)).source.plan), "blocks.0.attn.qkv"
        case _:
            found = parts()
            x, t = images(2, 4), 300
            text, name = str(plan_denoiser(found.denoiser.network, Settings(), lambda: found.denoiser(x, t))), "middle"
    assert name in text
    assert "\x1b" not in text
