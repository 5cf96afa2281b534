"""The LightningCLI behind fit, validate, test, predict, calibrate and analyze."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from importlib import import_module
from inspect import isclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import torch
from jsonargparse import SUPPRESS, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_quant
from lightning_quant.cli.advice import EXAMPLES, VERBS, UsageError
from lightning_quant.cli.checkpoints import NAMED, check_named, check_root, listed
from lightning_quant.cli.explain import explain
from lightning_quant.cli.in_float import InFloat
from lightning_quant.cli.trainer import CalibratingTrainer
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.gradient import GradientQuantization, IntervalStrategy
from lightning_quant.nn.what_ran import WhatRan
from lightning_quant.utilities.paths import trainer_path, user_path

# Options that may be written without a value.
_SWITCHES, _BOOLEANS = ("--compare_float",), ("true", "false")
# The class that jsonargparse failed to instantiate, innermost first.
_WRAPPED = re.compile(r"Given value: Namespace\(class_path='([\w.]+)'")


class Parser(LightningArgumentParser):
    """LightningCLI's parser with one-sentence errors."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class; an argument that takes an object or a mapping takes only the object here.

        A mapping accepts anything: one misspelled option of the object would become a mapping that replaces
        everything that a config says about it.
        """
        added: list[str] = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            if hasattr(action, "_typehint"):
                action._typehint = object_alone(action._typehint)
        return added

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse the arguments; `null` for a nested option of a class arrives here as the text `None`."""
        if args is not None:
            args = [f"{arg[:-4]}null" if arg.endswith("=None") else arg for arg in args]
            following = pairwise([*args, ""])
            args = [f"{arg}=true" if arg in _SWITCHES and then not in _BOOLEANS else arg for arg, then in following]
        return super().parse_args(args, *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what to write, and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        parsers = (parser, *_subparsers(parser))
        options = [action.dest for candidate in parsers for action in candidate._actions]
        bases = (LightningModule, LightningDataModule, Callback, IntervalStrategy, Optimizer, LRScheduler)
        public = [name for name in lightning_quant.__all__ if isclass(vars(lightning_quant).get(name))]
        classes = [*public, *(cls.__name__ for base in bases for cls in _subclasses(base))]
        sys.stderr.write(f"lightning-quant: {explain(message, classes, options)}\n")
        self.exit(2)


class QuantizationCLI(LightningCLI):
    """A LightningCLI with the option group `--quantization`: bits, interval, groups, ..., or `null` for float."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the verbs of Lightning and of this package, each with the arguments that are not options."""
        return {**LightningCLI.subcommands(), "calibrate": {"model", "datamodule"}, "analyze": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Make the help start with a description of the verb instead of fifty lines of option syntax."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = (
            f"lightning-quant {subcommand} --config FILE [--OPTION VALUE ...]\n\n"
            f"  lightning-quant {subcommand} {EXAMPLES[subcommand]}"
        )
        parser.description = (
            f"{VERBS[subcommand]} Options of a class are listed by --model.help ImageClassifier, --data.help"
            " DigitsDataModule, --quantization.help IGQViT."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--quantization`."""
        parser.add_argument(
            "--quantization",
            type=self.quantizations(),
            # An absent option differs from null, which also removes the quantizers of a checkpoint.
            default=SUPPRESS,
            help="GradientQuantization, IGQViT or AccuQuant, e.g. `--quantization.weight_bits 6`; null for float.",
        )

    @staticmethod
    def quantizations() -> Any:
        """Return the type of `--quantization`; options without a class name belong to the first class."""
        # Imported here because help does not need the libraries behind them.
        from lightning_quant.accuquant.callback import AccuQuant
        from lightning_quant.igq_vit.callback import IGQViT

        return GradientQuantization | IGQViT | AccuQuant | None

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without Lightning's warning about arguments passed beside `sys.argv`: here they come from it."""
        match args:
            case None | list():
                self.config = parser.parse_args(args)
            case _:
                self.config = parser.parse_object(args)
        _check_values(self.config.get(self.config.get("subcommand") or "") or self.config)

    def _parse_ckpt_path(self) -> None:
        """Read the model from a checkpoint that names its class; one written from Python does not."""
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path and (file := trainer_path(path)).is_file():
            checkpoint = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
            if "_class_path" not in checkpoint.get("hyper_parameters", {}):
                return
        super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; turn errors of their constructors into ConfigurationErrors."""
        try:
            super().instantiate_classes()
        except (UsageError, QuantizationError):
            raise
        except Exception as error:
            raise ConfigurationError(self._refusal(error)) from error
        if verb := self.config.get("subcommand"):
            check_named(verb, self.config[verb].get("ckpt_path"), self.trainer)
            check_root(self.trainer)

    def _refusal(self, error: Exception) -> str:
        """Return the option whose object could not be built, and the reason."""
        # jsonargparse wraps the error of an optional class's constructor, and may drop the original.
        text = str(error)
        classes = _WRAPPED.findall(text)
        reason = explain(text) if "Union subtypes" in text else text
        first = _first(error)
        if not isinstance(first, QuantizationError):
            reason = f"{type(first).__name__}: {reason} (--debug shows where)"
        config = self.config.get(self.config.get("subcommand") or "") or self.config
        options = {key: config.get(key) for key in ("model", "data", "quantization")}
        options |= {f"trainer.{key}": value for key, value in vars(config.trainer).items()}
        for key, value in options.items():
            if classes and isinstance(value, Namespace) and value.get("class_path") == classes[-1]:
                # Messages of our own constructors end with the line to write and a full stop.
                prefix = "" if reason.endswith(".") else f"{classes[-1].rpartition('.')[2]} cannot be built: "
                return f"--{key}: {prefix}{reason}"
            if isinstance(value, list) and text.endswith(f"Given value: {value}"):
                return f"--{key}: {reason}"
        return reason

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the quantization ahead of all other callbacks."""
        quantization, model = self._get(self.config_init, "quantization"), self._get(self.config_init, "model")
        calibrates = getattr(model, "fit_is_calibration", False)
        callbacks = kwargs.get("callbacks", self._get(self.config_init, "trainer")["callbacks"]) or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        of_model = model.configure_callbacks()
        of_model = of_model if isinstance(of_model, Sequence) else [of_model]
        if not any(isinstance(callback, WhatRan) for callback in of_model):
            callbacks.append(WhatRan())
        if quantization is None:
            evaluates = self.subcommand in ("validate", "test", "predict")
            in_float = evaluates and self._get(self.config_init, "quantization", default="") is None
            if in_float and calibrates:
                raise UsageError(
                    f"{type(model).__name__} is evaluated quantized, found --quantization null: write --compare_float"
                    f" to evaluate both, or --model with the float network."
                )
            return self._trainer(**{**kwargs, "callbacks": [InFloat(), *callbacks] if in_float else callbacks})
        if calibrates:
            raise UsageError(
                f"{type(model).__name__} is quantized by --model.quantization; write --model.quantization.OPTION"
                f" instead of --quantization.OPTION, found {type(quantization).__name__} there."
            )
        if any(isinstance(callback, type(quantization)) for callback in callbacks):
            name = type(quantization).__name__
            raise UsageError(f"{name} is given twice, as `quantization` and in `trainer.callbacks`; keep one of them.")
        # First, because a callback that copies the weights in `setup` (EMA) must see the quantized layers.
        return self._trainer(**{**kwargs, "callbacks": [quantization, *callbacks]})

    def _trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception as error:
            raise ConfigurationError(f"--trainer: {error}") from error


class _HelpCLI(QuantizationCLI):
    """CLI that answers `--help` only, without importing the calibrating callbacks."""

    @staticmethod
    def quantizations() -> Any:
        return GradientQuantization | None


def build(args: Sequence[str], run: bool = True) -> QuantizationCLI:
    """Parse a command line, build its objects and run its verb.

    Args:
        args: Command line without the name of the program; with `run=False` also without the verb.
        run: Whether to run the verb.
    """
    helping = bool({"-h", "--help"} & set(args))
    if not helping:
        # Short names such as `ImageClassifier` are found among imported classes; help does not need them.
        for name in lightning_quant.__all__:
            getattr(lightning_quant, name)
        import_module("lightning_quant.models")
    with _verbs_are_no_names() if helping else nullcontext():
        return (_HelpCLI if helping else QuantizationCLI)(
            args=list(args),
            run=run,
            trainer_class=CalibratingTrainer,
            parser_class=Parser,
            parser_kwargs={"prog": "lightning-quant", "description": lightning_quant.__doc__.partition("\n")[0]},
            save_config_kwargs={"overwrite": True},
        )


@contextmanager
def _verbs_are_no_names() -> Iterator[None]:
    """Keep the parser, which looks verbs up in the package, from importing everything that `analyze` needs."""
    names = vars(lightning_quant)
    absent = CalibratingTrainer.analyze.__name__ not in names
    if absent:
        names[CalibratingTrainer.analyze.__name__] = None
    try:
        yield
    finally:
        if absent:
            del names[CalibratingTrainer.analyze.__name__]


def _first(error: BaseException) -> BaseException:
    """Return the first error in the chain of causes."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _check_values(config: Any) -> None:
    """Refuse values that the parser accepts but LightningCLI fails on."""
    trainer, seed = config.get("trainer"), config.get("seed_everything")
    if not isinstance(trainer, Namespace):
        raise UsageError(f"--trainer: expected its options, as --trainer.max_epochs 1, found {trainer!r}.")
    if type(seed) is int and not 0 <= seed < 2**32:
        raise UsageError(f"--seed_everything: {seed} is not in 0 .. 4294967295.")
    path = str(config.get("ckpt_path") or "best")
    # Lightning resolves names, registries and addresses by itself.
    if path not in NAMED and not path.startswith("registry") and "://" not in path:
        config["ckpt_path"] = str(file := user_path(path))
        _check_exists(file)


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    folder = next(parent for parent in path.parents if parent.is_dir())
    raise UsageError(
        f"--ckpt_path {path}: there is no such file; the folder {folder} holds {listed(folder.iterdir())}."
    )


def object_alone(typehint: Any) -> Any:
    """Return the type of an option that takes an object or a mapping, without the mapping; other types unchanged.

    Example:
        >>> object_alone(Path | dict[str, int] | None)
        pathlib.Path | None
        >>> object_alone(str | dict[str, int] | None)
        str | dict[str, int] | None
    """
    options = get_args(typehint)
    mappings = [option for option in options if get_origin(option) is dict]
    others = [option for option in options if option not in (*mappings, type(None))]
    if not mappings or len(others) != 1 or not isclass(others[0]) or others[0].__module__ == "builtins":
        return typehint
    return reduce(operator.or_, [option for option in options if option not in mappings])


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield cls
        yield from _subclasses(cls)


def _subparsers(parser: LightningArgumentParser) -> Iterator[LightningArgumentParser]:
    for action in parser._actions:
        if isinstance(action.choices, dict):
            yield from action.choices.values()
