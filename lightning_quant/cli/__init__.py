"""The command line `lightning-quant`: a LightningCLI, the packaged configs and the demo.

torch and Lightning are imported only by the verbs that need them.
"""

from lightning_quant.cli.entry import main

__all__ = ["main"]
