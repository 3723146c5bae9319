"""Latency tables and the predictors fitted to them."""
