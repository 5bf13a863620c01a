"""A stack of layers on tensors, without modules: the kernels, autograd, and torch's operators."""
