"""A stack of layers on tensors, below any module: the kernels, autograd, and torch's operators."""
