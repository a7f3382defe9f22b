"""Pairs of images: finding, checking, jittering and loading them."""
