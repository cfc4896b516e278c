"""Other libraries' flows, faster without a change: ``accelerate(model)``, and how to add a layer of your own."""

from .accelerate import accelerate, restore
from .adapter import Adapter, Call
from .registry import register, served
from .report import Report, Row

__all__ = ["Adapter", "Call", "Report", "Row", "accelerate", "register", "restore", "served"]
