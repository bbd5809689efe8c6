"""How processes on Linux get their memory from the kernel.

glibc gives large freed blocks back and asks for them again, for the next layer's activations, which the kernel hands
out zeroed, one page of 4 KiB after the other: on CPU that is up to a third of a training step. With large pages it
is done 512 pages at a time. The variables are read when a process starts, so they are set for the processes of Ray; a
value that the environment has already counts. glibc before 2.35, and kernels without transparent large pages, ignore
them.
"""

from __future__ import annotations

LARGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",  # the heaps of other threads than the main one, as Ray Train's, have 64 MB at most
}
