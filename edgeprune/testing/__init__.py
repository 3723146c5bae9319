"""Conformance suites and fakes that third parties can use too."""
