"""Adapters for zuko 1.6 (https://github.com/probabilists/zuko). The library is never imported."""
