"""Device functions of the kernels, by job; no kernel is launched from here."""
