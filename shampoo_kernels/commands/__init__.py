"""The commands of `python -m shampoo_kernels`: one module each, imported when it is called.

Each has `add_arguments(parser)` and `run(args) -> int`, the exit status.
"""

COMMANDS = {
    "bench": "time every op on every backend that is here, and say which to prefer",
    "demo": "train on real images with AdamW and with Shampoo, and compare",
    "info": "what is built, which backend serves which op on which device, and why not",
    "study": "measure how good Kronecker approximations are, and check the paper's claims",
}
