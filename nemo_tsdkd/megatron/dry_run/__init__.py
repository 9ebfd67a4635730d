"""One rank of a training job, run on fake tensors among fake ranks: its memory, collectives and FLOPs, without a GPU.

`run.py` calls the package's own training code under `distributed/ledger.py`, which watches the operators; `fakes.py`
answers for the ranks and the values that are not there; `kernels.py` stands for the GPU's fused kernels.
`nemo_tsdkd.plan` starts a process for each rank that it wants to know of.
"""
