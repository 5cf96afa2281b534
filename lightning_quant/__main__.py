"""`python -m lightning_quant` is `lightning-quant`."""

from lightning_quant.cli import main

if __name__ == "__main__":
    main()
