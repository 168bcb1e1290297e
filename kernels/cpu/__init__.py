"""The CPU's own kernels: C for AVX512-BF16, compiled on first use by the machine's C compiler, as Triton does for a GPU.

Where the processor lacks the instructions, or the machine a compiler, torch's operators (kernels/reference.py) do the work.
"""
