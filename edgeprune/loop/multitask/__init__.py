"""Pruning under one limit per objective: PAGCP's search, and what it needs."""
