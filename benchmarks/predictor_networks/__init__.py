"""Networks and figures of `benchmarks/predictor_board.py`."""
