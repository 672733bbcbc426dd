"""Step-addressed randomness: every draw has an address, and no draw touches global state.

A generator is a pure function of `(seed, purpose, *address)`. Two objectives with the same seed
therefore see the same samples, noise and timesteps, and a resumed run has no sampler state to
restore.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, purpose: str, *address: int) -> int:
    """A 63-bit seed for one purpose at one address, e.g. `("noise", step, sample)`."""
    text = "/".join([str(seed), purpose, *map(str, address)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, *address: int) -> torch.Generator:
    """A CPU generator for one purpose at one address.

    Always on the CPU, so that the same bits come out whatever device then uses them.
    """
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *address))


@contextmanager
def global_draws(seed: int, purpose: str) -> Iterator[None]:
    """What libraries draw on the CPU within this comes from `(seed, purpose)` alone.

    For modules that draw their own initial weights. Afterwards the global state is as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, purpose))
        yield
