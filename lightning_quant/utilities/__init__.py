"""Helpers that are independent of quantization: ranks, files, paths, tables, progress bars, hashes and text."""
