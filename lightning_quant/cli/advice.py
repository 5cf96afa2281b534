"""Error messages for mistakes on the command line, each with the line to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

VERBS = {
    "fit": "Train a model, quantized or float.",
    "validate": "Evaluate on the validation set.",
    "test": "Evaluate on the test set.",
    "predict": "Run inference.",
    "calibrate": "Calibrate a quantized network on unlabeled images, or a diffusion model on its own samples.",
    "analyze": "Measure a quantized network layer by layer on its test data, and write a report.",
    "configs": "List the packaged configs, or print one.",
    "demo": "Train and calibrate small networks on the embedded digits, and show what each method does.",
}
# Example options for each verb of the Trainer.
EXAMPLES = {
    "fit": "--config quickstart.yaml --trainer.max_epochs 3",
    "validate": "--config quickstart.yaml --ckpt_path last.ckpt",
    "test": "--config quickstart.yaml --ckpt_path last.ckpt",
    "predict": "--config accuquant/quickstart.yaml --ckpt_path digits_ddim_4bit/last.ckpt",
    "calibrate": "--config igq_vit/quickstart.yaml",
    "analyze": "--config igq_vit/quickstart.yaml --ckpt_path digits_vit_4bit/last.ckpt --folder report",
}


class UsageError(Exception):
    """Error of a command line that cannot be run; the message says what to write."""


def did_you_mean(given: str, candidates: Iterable[str]) -> str:
    """Return a phrase that names near matches; empty if there are none.

    Example:
        >>> did_you_mean("quikstart", ["quickstart.yaml", "other.yaml"])
        ' (did you mean quickstart.yaml?)'
        >>> did_you_mean("xyz", ["quickstart.yaml"])
        ''
    """
    names = sorted(set(candidates))
    near = get_close_matches(given, names, n=3, cutoff=0.6)
    near = near or [name for name in names if name.lower().startswith(given.lower())][:3]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def check_verb(argv: Sequence[str]) -> None:
    """Refuse a command line whose first word is not a verb.

    Raises:
        UsageError: Missing or unknown verb, or an option before the verb.

    Example:
        >>> check_verb(["fit"])
        >>> check_verb(["--config", "x.yaml", "fit"])
        Traceback (most recent call last):
        lightning_quant.cli.advice.UsageError: The verb comes first: lightning-quant fit --config x.yaml
    """
    verbs = ", ".join(VERBS)
    if not argv:
        raise UsageError(f"A verb is missing ({verbs}); try: lightning-quant fit --config quickstart.yaml")
    first, *rest = argv
    if first in VERBS:
        return
    if not first.startswith("-"):
        raise UsageError(f"Unknown verb {first!r}{did_you_mean(first, VERBS)}; expected one of {verbs}.")
    verb = next((word for word in rest if word in VERBS), None)
    if verb is None:
        raise UsageError(f"A verb is missing ({verbs}); try: lightning-quant fit {' '.join(argv)}")
    options = list(argv)
    options.remove(verb)
    raise UsageError(f"The verb comes first: lightning-quant {verb} {' '.join(options)}")
