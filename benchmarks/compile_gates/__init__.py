"""``make kernels``: do the kernels compile well for every GPU? None is needed."""
