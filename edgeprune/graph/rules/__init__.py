"""One file per family of ATen operations; `table` finds the rule of an operation."""
