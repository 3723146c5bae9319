"""Importance scores, one per file, and the damage curves made of them."""
