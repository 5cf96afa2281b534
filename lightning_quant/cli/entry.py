"""Entry point of the command line."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from lightning_quant import __version__
from lightning_quant.cli import packaged
from lightning_quant.cli.advice import VERBS, UsageError, check_verb
from lightning_quant.errors import QuantizationError

# As a shell says it of a process that SIGPIPE has ended.
_BROKEN_PIPE = 141
_HELP = """\
usage: lightning-quant VERB [options]

Low-bit training and calibration of vision models.

verbs:
{verbs}

  lightning-quant VERB --help             options of a verb
  lightning-quant fit --config NAME       NAME: your own file, or one of `lightning-quant configs`

options: --help, --version, --debug (after the verb: show tracebacks; same as LIGHTNING_QUANT_DEBUG=1)
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line.

    Args:
        args: Words after `lightning-quant`; None takes those of the process.

    Raises:
        SystemExit: Code 2 for a wrong command line, code 1 for an error of the package; both print one message to
            stderr. `--debug` raises the error instead.

    Example:
        >>> main(["configs", "quickstart"])  # doctest: +ELLIPSIS
        # Digits...
    """
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv or os.environ.get("LIGHTNING_QUANT_DEBUG", "0") not in ("", "0")
    try:
        _dispatch([arg for arg in argv if arg != "--debug"])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has gone; what is left must not be flushed again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_BROKEN_PIPE)
    except (UsageError, QuantizationError) as error:
        if debug:
            raise
        sys.stderr.write(f"lightning-quant: {error}\n")
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _dispatch(argv: list[str]) -> None:
    match argv:
        case ["-h" | "--help", *_]:
            print(_HELP.format(verbs="\n".join(f"  {verb:<12}{text}" for verb, text in VERBS.items())), end="")
            return
        case ["--version", *_]:
            print(f"lightning-quant {__version__}")
            return
    check_verb(argv)
    match argv:
        case ["configs", *rest]:
            _configs(rest)
        case ["demo", *rest]:
            _demo(rest)
        case _:
            resolved = packaged.resolve(argv)
            from lightning_quant.cli.lightning_cli import build  # takes seconds: torch and Lightning

            build(resolved)


def _configs(argv: Sequence[str]) -> None:
    parser = ArgumentParser("lightning-quant configs", description=VERBS["configs"])
    parser.add_argument("name", nargs="?", help="print this one instead of the list")
    name = parser.parse_args(argv).name
    if name is not None:
        print(packaged.find(name).read_text(encoding="utf-8"), end="")
        return
    names = packaged.names()
    width = max(map(len, names)) + 2
    for name in names:
        print(f"{name:<{width}}{packaged.describe(name)}")


def _demo(argv: Sequence[str]) -> None:
    parser = ArgumentParser("lightning-quant demo", description=VERBS["demo"])
    parser.add_argument("--output", default="demo", help="folder for the results (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    options = parser.parse_args(argv)
    from lightning_quant.demo import main as demo  # takes seconds: torch and Lightning

    demo(output=options.output, seed=options.seed)
