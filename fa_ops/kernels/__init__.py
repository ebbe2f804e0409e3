"""Triton kernels and their launch configurations. Never imports torch."""
