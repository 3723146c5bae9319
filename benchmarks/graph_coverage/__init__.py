"""What `benchmarks/graph.py` consists of: the models, one side per module, and the table."""
