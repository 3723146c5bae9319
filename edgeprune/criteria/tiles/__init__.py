"""Scores and damage curves of the tiles of linear layers."""
