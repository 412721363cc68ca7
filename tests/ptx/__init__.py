"""Runs the PTX of CUDA kernels on a CPU, as hostile as the hardware may be; see README.md."""
