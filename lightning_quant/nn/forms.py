"""Quantized forms of classes: registered ones, and those derived for subclasses of a registered class."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import new_class
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn.modes import evaluating
from lightning_quant.nn.quantized_module import QuantizedModule

Form = TypeVar("Form", bound=QuantizedModule)
Find = Callable[[type[nn.Module]], "type[QuantizedModule] | None"]

LAYERS: dict[type[nn.Module], type[QuantizedModule]] = {}
# Methods that define what a layer computes: a class that inherits them computes the same as its base class.
_COMPUTES = ("forward", "_conv_forward", "__call__")
# Attributes that Python creates for each class.
_OF_A_CLASS = ("__dict__", "__weakref__")


def register(layer: type[nn.Module]) -> Callable[[type[Form]], type[Form]]:
    """Register the decorated class as the quantized form of ``layer`` and of subclasses that compute the same."""

    def add(quantized: type[Form]) -> type[Form]:
        LAYERS[layer] = quantized
        return form_for(layer, quantized, layer_form)

    return add


def form_for(kind: type[nn.Module], form: type[Form], find: Find) -> type[Form]:
    """Return ``form`` if it is a subclass of ``kind``, otherwise a new class that derives from both.

    Calling the class creates a float module of ``kind``, since libraries write ``type(layer)(...)`` to create a layer
    of the same type.

    Args:
        kind: Class of a float module.
        form: Quantizing mixin, or a class that derives from it.
        find: Function that returns the form of a class, for pickle.
    """
    if not issubclass(form, kind):

        def reduce(module: nn.Module, protocol: Any) -> Any:
            return _empty_module, (find, kind), *object.__reduce_ex__(module, protocol)[2:]

        # __reduce_ex__, since pickle cannot look the class up by name.
        attributes = {"__module__": __name__, "__doc__": form.__doc__, "__reduce_ex__": reduce}
        derived = new_class(f"Quantized{kind.__name__}", (form, kind), exec_body=lambda n: n.update(attributes))
        form = cast("type[Form]", derived)

    @wraps(kind.__init__)
    def initialize(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        module.__class__ = kind  # type: ignore[assignment]
        kind.__init__(module, *args, **kwargs)

    form.float_class = kind
    form.__init__ = initialize  # type: ignore[method-assign, assignment]
    return form


def _empty_module(find: Find, kind: type[nn.Module]) -> QuantizedModule:
    """Create an empty module of the form of ``kind``, which pickle and deepcopy fill."""
    form = find(kind)
    if form is None:
        raise UnsupportedModelError(
            f"Cannot load a quantized {kind.__module__}.{kind.__qualname__}, since this class is not registered:"
            " register it before loading, as it was when it was saved."
        )
    return form.__new__(form)


def _nearest(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the registered class that a class is or derives from."""
    return next((base for base in kind.__mro__ if base in LAYERS), None)


def layer_form(kind: type[nn.Module]) -> type[QuantizedModule] | None:
    """Return the quantized form of a layer class, or None if it has none."""
    base = _nearest(kind)
    if base is None or any(getattr(kind, name, None) is not getattr(base, name, None) for name in _COMPUTES):
        return None
    if base is kind:
        return LAYERS[kind]
    # A class keeps weak references to its subclasses, so a form is found as long as it is in use.
    forms = (c for c in kind.__subclasses__() if issubclass(c, LAYERS[base]) and c.float_class is kind)
    return next(forms, None) or form_for(kind, LAYERS[base], layer_form)


def obstacle(layer: nn.Module) -> str:
    """Return why a module cannot become a quantized layer, or an empty string if it can."""
    kind = type_before_parametrizations(layer)
    if isinstance(layer, QuantizedModule):
        return f"{layer.float_class.__name__} is already quantized"
    if _nearest(kind) is None:
        registered = ", ".join(c.__name__ for c in LAYERS)
        return (
            f"{kind.__name__} has no quantized form: expected one of {registered}, or a class registered with"
            " lightning_quant.nn.register"
        )
    # FSDP2 changes the class of each module that it shards. Sharding a block leaves the classes of its layers alone.
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "passed to fully_shard on its own: shard the block that contains it"
    if isinstance(layer, LazyModuleMixin):
        return f"{kind.__name__} is uninitialized: run one forward pass through the network first"
    if layer_form(kind) is None or not vars(layer).keys().isdisjoint(_COMPUTES):
        return f"{kind.__name__} has its own forward"
    return ""


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer in evaluation mode, since a parametrization may take a step in training mode."""
    with evaluating(layer):
        return cast(Tensor, layer.weight)


def exchange(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a layer, below the class that ``torch.nn.utils.parametrize`` adds on top."""
    if is_parametrized(layer):
        attributes = {name: value for name, value in vars(type(layer)).items() if name not in _OF_A_CLASS}
        kind = new_class(f"Parametrized{kind.__name__}", (kind,), exec_body=lambda n: n.update(attributes))
    layer.__class__ = kind  # type: ignore[assignment]
