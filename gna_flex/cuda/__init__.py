"""Hand-written CUDA kernels and the tables that drive them."""
