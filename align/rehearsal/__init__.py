"""Rehearses a command without a card: what would it need, would it fit, and what is wrong with it."""
