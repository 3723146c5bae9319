"""Artifacts, gates, releases and rollback."""
