"""What training asks of the memory allocator."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt`` in glibc."""

_LARGEST_BLOCK, _LARGEST_REST = 1 << 30, (1 << 31) - 1
"""Bytes: of a block that is kept once freed, and that may lie unused before any go back."""


def keep_freed() -> bool:
    """Let this process reuse the memory of freed tensors instead of giving it back.

    glibc returns blocks of megabytes to the system as they are freed and asks for them anew, zeroed
    and page by page, so that training on a CPU spends a good part of its time in the kernel. It
    changes the whole process, whose memory then stays at its peak: for programs that train, not
    for libraries in other people's.

    Returns:
        Whether the allocator did as told; False without glibc, which changes nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows, macOS
        return False
    blocks, rest = mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK), mallopt(_TRIM_THRESHOLD, _LARGEST_REST)
    return bool(blocks and rest)
