"""The only files that are copied to a board: Python >= 3.6 with its standard library, nothing of edgeprune."""
