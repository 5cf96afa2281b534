"""Helpers that know nothing of quantization: ranks, files, paths, tables, progress bars, hashes and texts."""
