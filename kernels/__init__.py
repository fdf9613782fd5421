"""Triton kernels: one stand-alone file per op. This folder installs as ``fastfusion.kernels``."""
