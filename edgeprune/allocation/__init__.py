"""From damage and cost to widths, one allocator per file."""
