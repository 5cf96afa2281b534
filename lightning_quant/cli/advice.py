"""Mistakes on the command line, each turned into one sentence that says what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

VERBS = {
    "fit": "Train a model, quantized or float.",
    "validate": "Evaluate on the validation set.",
    "test": "Evaluate on the test set.",
    "predict": "Run inference.",
    "calibrate": "Calibrate a quantized network: on unlabelled images, or on what a diffusion model samples.",
    "analyze": "Measure a quantized network layer by layer on its test data, and write a report of it.",
    "configs": "List the packaged configs, or print one.",
    "demo": "Train and calibrate small networks on the embedded digits, and show what each method does.",
}
# What a verb of the Trainer is called with.
EXAMPLES = {
    "fit": "--config quickstart.yaml --trainer.max_epochs 3",
    "validate": "--config quickstart.yaml --ckpt_path last.ckpt",
    "test": "--config quickstart.yaml --ckpt_path last.ckpt",
    "predict": "--config accuquant/quickstart.yaml --ckpt_path digits_ddim_4bit/last.ckpt",
    "calibrate": "--config igq_vit/quickstart.yaml",
    "analyze": "--config igq_vit/quickstart.yaml --ckpt_path digits_vit_4bit/last.ckpt --folder report",
}


class UsageError(Exception):
    """A command line that cannot be run; the message says what to write."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A phrase that names near matches, or nothing.

    Example:
        >>> did_you_mean("quikstart", ["quickstart.yaml", "other.yaml"])
        ' (did you mean quickstart.yaml?)'
        >>> did_you_mean("xyz", ["quickstart.yaml"])
        ''
    """
    names = sorted(set(known))
    near = get_close_matches(given, names, n=3, cutoff=0.6)
    near = near or [name for name in names if name.lower().startswith(given.lower())][:3]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def check_verb(argv: Sequence[str]) -> None:
    """Refuse a command line whose first word is not a verb.

    Raises:
        UsageError: No verb, an unknown one, or an option before it.

    Example:
        >>> check_verb(["fit"])
        >>> check_verb(["--config", "x.yaml", "fit"])
        Traceback (most recent call last):
        lightning_quant.cli.advice.UsageError: The verb comes first: lightning-quant fit --config x.yaml
    """
    known = ", ".join(VERBS)
    if not argv:
        raise UsageError(f"A verb is missing ({known}); try: lightning-quant fit --config quickstart.yaml")
    first, *rest = argv
    if first in VERBS:
        return
    if not first.startswith("-"):
        raise UsageError(f"Unknown verb {first!r}{did_you_mean(first, VERBS)}; there are {known}.")
    verb = next((word for word in rest if word in VERBS), None)
    if verb is None:
        raise UsageError(f"A verb is missing ({known}); try: lightning-quant fit {' '.join(argv)}")
    others = list(argv)
    others.remove(verb)
    raise UsageError(f"The verb comes first: lightning-quant {verb} {' '.join(others)}")
