"""Measured choices: numerics before times, times that no cache and no launch flatters, and where they are kept."""
