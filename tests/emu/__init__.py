"""The CUDA kernels of csrc/cuda run on a CPU, from the source that nvcc compiles; see docs/notes/emulation.md."""
