"""The GPU benchmark: one command, offline, at most eight minutes, most important first, every row written as soon as it is measured.

    python -m benchmarks.gpu --out DIR       measures and writes DIR/<chip>/gpu_<op>.json, in the format of benchmarks/record.py
    python -m benchmarks.gpu --dry-run       prints what it would measure; needs no GPU
    python -m benchmarks.gpu --small         the whole way on the CPU, at tiny sizes, to see that it works

First the ceilings: a device copy (GB/s) and a bf16 matrix product (TFLOP/s). Then each op (cases.py) with fastgpt's engines `triton`
and `cuda` against torch eager, torch.compile, torch's SDPA backends by name, and Liger-Kernel and quack where they are installed; fifth
in the order a training step of GPT-2 124M (step.py). Inputs are random and new on every run; results are held against float64 in the
same run by the rule of benchmarks/harness.py: a variant that breaks it is left out, with its errors. How it is timed: timing.py.
A variant that ends the process, loses the device or never returns is left out, too, and the run goes on (supervise.py).

Not among the cases: dropout, whose mask no other library can repeat. None of this has run on a GPU yet.
"""
