"""Capture a model and find which channels hang together."""
