"""Consumers that are killed, paused, cut off and asked to stop; others must end their work."""
