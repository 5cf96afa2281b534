"""Low-bit training and calibration of vision models as Lightning callbacks and LightningModules.

Public names are imported on first use, so that `import lightning_quant` stays fast:

Example:
    >>> import lightning_quant
    >>> lightning_quant.GradientQuantization.__name__
    'GradientQuantization'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_quant.accuquant import AccuQuant, AccuQuantModule, load_float_pipeline
    from lightning_quant.data import (
        CIFARDataModule,
        DigitsDataModule,
        FashionMNISTDataModule,
        ImageFolderDataModule,
    )
    from lightning_quant.errors import QuantizationError
    from lightning_quant.export import (
        SaveQuantized,
        load_from_checkpoint,
        load_quantized,
        load_quantized_pipeline,
        save_quantized,
        save_quantized_pipeline,
    )
    from lightning_quant.gradient import (
        FixedInterval,
        GradientQuantization,
        LargeGradientInterval,
        MinimumErrorInterval,
        MinMaxInterval,
    )
    from lightning_quant.igq_vit import IGQViT, IGQViTModule
    from lightning_quant.metrics import GenerationMetrics
    from lightning_quant.nn import strip
    from lightning_quant.report import CalibrationPictures, GenerationPictures, QuantizationReport, analyze
    from lightning_quant.tasks import ImageClassifier, ImageDiffusion

__version__ = "0.1.0"

__all__ = [
    "AccuQuant",
    "AccuQuantModule",
    "CIFARDataModule",
    "CalibrationPictures",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "FixedInterval",
    "GenerationMetrics",
    "GenerationPictures",
    "GradientQuantization",
    "IGQViT",
    "IGQViTModule",
    "ImageClassifier",
    "ImageDiffusion",
    "ImageFolderDataModule",
    "LargeGradientInterval",
    "MinMaxInterval",
    "MinimumErrorInterval",
    "QuantizationError",
    "QuantizationReport",
    "SaveQuantized",
    "__version__",
    "analyze",
    "load_float_pipeline",
    "load_from_checkpoint",
    "load_quantized",
    "load_quantized_pipeline",
    "save_quantized",
    "save_quantized_pipeline",
    "strip",
]

_HOME = {
    "AccuQuant": "accuquant",
    "AccuQuantModule": "accuquant",
    "CIFARDataModule": "data",
    "CalibrationPictures": "report",
    "DigitsDataModule": "data",
    "FashionMNISTDataModule": "data",
    "FixedInterval": "gradient",
    "GenerationMetrics": "metrics",
    "GenerationPictures": "report",
    "GradientQuantization": "gradient",
    "IGQViT": "igq_vit",
    "IGQViTModule": "igq_vit",
    "ImageClassifier": "tasks",
    "ImageDiffusion": "tasks",
    "ImageFolderDataModule": "data",
    "LargeGradientInterval": "gradient",
    "MinMaxInterval": "gradient",
    "MinimumErrorInterval": "gradient",
    "QuantizationError": "errors",
    "QuantizationReport": "report",
    "SaveQuantized": "export",
    "analyze": "report",
    "load_float_pipeline": "accuquant",
    "load_from_checkpoint": "export",
    "load_quantized": "export",
    "load_quantized_pipeline": "export",
    "save_quantized": "export",
    "save_quantized_pipeline": "export",
    "strip": "nn",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
