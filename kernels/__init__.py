"""Triton kernels, a room for each family; this folder installs as ``fastfusion.kernels``.

A room holds kernels and their launchers. `device/` has the device functions that kernels share,
`host/` what the launchers do.
"""
