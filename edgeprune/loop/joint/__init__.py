"""Tiles and channels in one allocation."""
