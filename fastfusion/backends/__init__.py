"""Where the kernels of each device are loaded, asked whether they can run a call, and launched."""
