"""Other ways to the same latency, for `pruning_quality.py`."""
