"""Adapters for normflows 1.7 (https://github.com/VincentStimper/normalizing-flows). The library is never imported."""
