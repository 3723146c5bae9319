"""Losses that pull a pruned model toward the dense one."""
