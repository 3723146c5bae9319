"""Compilers and runtimes behind one interface."""
