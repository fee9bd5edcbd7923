"""Replaces kernels of torch's own operators."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import library

_replaced: list[library.Library] = []  # its kernels go when it goes


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def replace(operation: torch._ops.OpOverload, key: str, make: Callable[[Any], Callable]) -> None:
    """Puts what `make` returns in the place of the kernel for the dispatch key.

    `make` gets torch's own, None where there is none. The new one gets the dispatch keys before its arguments.
    """
    if not _replaced:
        _replaced.append(library.Library("aten", "IMPL"))
    native = library.get_kernel(operation, key) if has_kernel(operation.name(), key) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Overriding a previously registered kernel": that is the aim
        _replaced[0].impl(operation.name().removeprefix("aten::"), make(native), key, with_keyset=True)
