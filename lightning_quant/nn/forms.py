"""Quantized forms of classes: registered ones, and those made of a class and the form of the class it derives from."""

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
# What a layer computes: a class that takes these from a registered one computes as that does.
_COMPUTES = ("forward", "_conv_forward", "__call__")
# What Python gives to each class anew.
_OF_A_CLASS = ("__dict__", "__weakref__")


def register(layer: type[nn.Module]) -> Callable[[type[Form]], type[Form]]:
    """Class decorator that makes a quantized layer the form of ``layer``, and of subclasses that compute as it does."""

    def add(quantized: type[Form]) -> type[Form]:
        LAYERS[layer] = quantized
        return form_for(layer, quantized, layer_form)

    return add


def form_for(kind: type[nn.Module], form: type[Form], find: Find) -> type[Form]:
    """``form`` itself where it is a subclass of ``kind``, else a class that is both.

    Calling it makes a module of ``kind``: libraries write ``type(layer)(...)`` for another layer like this one.

    Args:
        kind: Class of a float module.
        form: Mixin that quantizes, or a class that has it.
        find: Function that finds the form of a class again, for pickle.
    """
    if not issubclass(form, kind):

        def reduce(module: nn.Module, protocol: Any) -> Any:
            return _made_again, (find, kind), *object.__reduce_ex__(module, protocol)[2:]

        # No name that pickle could look up.
        own = {"__module__": __name__, "__doc__": form.__doc__, "__reduce_ex__": reduce}
        made = new_class(f"Quantized{kind.__name__}", (form, kind), exec_body=lambda n: n.update(own))
        form = cast("type[Form]", made)

    @wraps(kind.__init__)
    def initialize(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        module.__class__ = kind  # type: ignore[assignment]
        kind.__init__(module, *args, **kwargs)

    form.float_class = kind
    form.__init__ = initialize  # type: ignore[method-assign, assignment]
    return form


def _made_again(find: Find, kind: type[nn.Module]) -> QuantizedModule:
    """An empty module of the form of ``kind``, for pickle and deepcopy to fill."""
    form = find(kind)
    if form is None:
        raise UnsupportedModelError(
            f"What is loaded is a quantized {kind.__module__}.{kind.__qualname__}, which is not known here: register it"
            " before it is loaded, as it was when it was saved."
        )
    return form.__new__(form)


def _nearest(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The registered class that a class is or derives from."""
    return next((base for base in kind.__mro__ if base in LAYERS), None)


def layer_form(kind: type[nn.Module]) -> type[QuantizedModule] | None:
    """The quantized form of a class of layers; None where it has none."""
    base = _nearest(kind)
    if base is None or any(getattr(kind, name, None) is not getattr(base, name, None) for name in _COMPUTES):
        return None
    if base is kind:
        return LAYERS[kind]
    # A class knows the classes made of it as long as they are used.
    made = (c for c in kind.__subclasses__() if issubclass(c, LAYERS[base]) and c.float_class is kind)
    return next(made, None) or form_for(kind, LAYERS[base], layer_form)


def obstacle(layer: nn.Module) -> str:
    """Why a module cannot be swapped for a quantized layer; empty where it can."""
    kind = type_before_parametrizations(layer)
    if isinstance(layer, QuantizedModule):
        return f"{layer.float_class.__name__} is quantized already"
    if _nearest(kind) is None:
        known = ", ".join(c.__name__ for c in LAYERS)
        return (
            f"{kind.__name__} has no quantized form: expected one of {known}, or a class given to"
            " lightning_quant.nn.register"
        )
    # FSDP2 gives what it shards a class of its own; of a block that is none of ours.
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "given to fully_shard by itself: shard the block that holds it"
    if isinstance(layer, LazyModuleMixin):
        return f"{kind.__name__} is uninitialised: run one forward pass through the network first"
    if layer_form(kind) is None or not vars(layer).keys().isdisjoint(_COMPUTES):
        return f"{kind.__name__} has a forward of its own"
    return ""


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer, and the layer as it was: a parametrization that is asked in training may take a step."""
    with evaluating(layer):
        return cast(Tensor, layer.weight)


def exchange(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Give a layer another class, below the one that ``torch.nn.utils.parametrize`` puts on top."""
    if is_parametrized(layer):
        own = {name: value for name, value in vars(type(layer)).items() if name not in _OF_A_CLASS}
        kind = new_class(f"Parametrized{kind.__name__}", (kind,), exec_body=lambda n: n.update(own))
    layer.__class__ = kind  # type: ignore[assignment]
