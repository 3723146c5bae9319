"""The closed loop behind `edgeprune.prune`."""
