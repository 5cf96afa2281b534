"""The command line `lightning-quant`: a LightningCLI, the packaged configs and the demo.

Nothing here imports torch or Lightning before a verb that needs them runs.
"""

from lightning_quant.cli.entry import main

__all__ = ["main"]
