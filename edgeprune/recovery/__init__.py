"""Bring accuracy back after a cut."""
