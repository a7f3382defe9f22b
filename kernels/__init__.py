"""Kernels of training and inference: every fast one beside its plain twin, one op per file.

This package imports torch and, where it is installed, triton. Without triton the plain twins run.
"""
