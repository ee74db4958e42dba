"""Other packages' optimizers on these kernels: one module a peer, imported when it is asked for.

`from shampoo_kernels.integrations import pytorch_optimizer; pytorch_optimizer.enable()`. The peer's
class, its options and its state stay as they are. Importing a module here imports no peer.
"""
