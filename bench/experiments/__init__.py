"""The paper's claims, repeated: experiments that declare their cells, each run once, and pages made of the results."""

import os

# torch would otherwise ask CUDA itself whether there is a GPU, and a process that has been asked cannot be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
