"""How processes on Linux get their memory from the kernel: once.

glibc gives large freed blocks back and asks for them again, for the next layer's activations, which the kernel hands
out zeroed, one page of 4 KiB after the other: on CPU that is up to half of a training step. Blocks below a threshold
that no tensor reaches come from the heap instead, which is kept while the process lives, and from large pages where
the kernel has them. A process then holds as much as its largest step needed, fragments included: up to twice its peak
without. The variables are read when a process starts, so they are set for the processes of Ray; a value that the
environment has already counts. Other C libraries ignore them, as glibc before 2.35 and kernels without transparent
large pages do the first.
"""

_BEYOND_ANY_TENSOR = 2**40  # bytes

ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
    f":glibc.malloc.mmap_threshold={_BEYOND_ANY_TENSOR}"
    f":glibc.malloc.trim_threshold={_BEYOND_ANY_TENSOR}",
    "MALLOC_ARENA_MAX": "1",  # the heaps of other threads than the main one, as Ray Train's, have 64 MB at most
}
