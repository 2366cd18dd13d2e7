"""Caddie's control plane: studies in, record tables out. Never imports torch."""

__version__ = "0.1.0"
