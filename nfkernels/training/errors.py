"""What training raises for a user's mistake or a run that went wrong: one sentence each."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run cannot start, continue or finish; the message says why and what to do."""
