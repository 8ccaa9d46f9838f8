"""Triton kernels for GPUs, each with a definition in plain torch, which runs wherever they cannot.

Reading order: `launch` (where kernels run), `gate` (the Engram gate), `cross_entropy` (the head and its loss in chunks
of tokens), `grouped_swiglu` (the routed experts) on the kernels of `grouped_gemm_triton`. Only files named
`*_triton.py` import Triton, when a kernel runs for the first time.
"""
