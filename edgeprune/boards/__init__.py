"""Boards: a device type plus a connection."""
