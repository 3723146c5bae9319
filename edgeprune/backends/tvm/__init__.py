"""TVM: networks compiled ahead of time to a shared library for one architecture and instruction set."""
