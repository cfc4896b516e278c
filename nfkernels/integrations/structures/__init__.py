"""Layers known by their parameters' names, shapes and signatures: Glow ports, flows of speech models. Always proved."""
