"""One run on a GPU: correctness and speed of every kernel, whole-model training, and decoding.

    python -m benchmarks.gpu            measures on the visible GPU, in under 8 minutes
    python -m benchmarks.gpu --toy      rehearses everything on the CPU, in Triton's interpreter, without a number

It prints one table and writes one record, `benchmarks/results/gpu-<device>.json`, with the hardware, driver, versions,
date and commit; the record is written anew after each section, so that a run that is cut short leaves what it has.

What is compared with what:

- *Ceilings* of the same run: a copy of 4 GB, counting bytes read and written, and a large bf16 product. A kernel's
  "of ceiling" is the least time its operands allow, each moved once (or its products), over the time it took.
- *Checks* come first, each op in a process of its own, and decide what may be timed: bf16 and fp32 against fp64, all
  layouts, gradients, states, NaN in whatever is not written, the same bits twice. No speed is printed of what did not
  pass, nor of a model that runs it.
- *Kernels* at 8,192, 65,536 and 131,072 tokens, 1,920 and 4,096 wide: CUDA events around each pass, the cache emptied
  before, inputs in rotation, the median; beside plain PyTorch, torch.compile of it (at one size), and Liger, fla-core
  and causal-conv1d where they are installed.
- *Length*: what a token costs the Hyena operators from 8,192 tokens to 1,048,576.
- *Training*: optimiser steps of Evo 2 1B and ESM-2 650M and 3B as `cistron pretrain` takes them, with the costliest
  kernels in the record. MFU counts `flops` over the data sheet's bf16 rate.
- *Decode*: Evo 2 1B, one prompt and 64 of mixed lengths, steps and replayed CUDA graphs.

Each section has a share of the time; what does not fit is listed as skipped. A section that fails is recorded with its
error, and the others go on.
"""
