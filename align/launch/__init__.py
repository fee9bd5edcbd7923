"""Ranks on cards and nodes, until all of them have ended."""
