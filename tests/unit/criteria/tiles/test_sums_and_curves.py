"""Scores and damages of tiles equal their formulas, evaluated the slow way: whole matrices, one weight at a time."""
