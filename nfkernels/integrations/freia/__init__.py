"""Adapters for FrEIA 0.2 (https://github.com/vislearn/FrEIA). The library is never imported."""
