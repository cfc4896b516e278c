"""Adapters for nflows 0.14 (https://github.com/bayesiains/nflows). The library itself is never imported."""
