// What the C library's allocator keeps.
//
// glibc maps blocks from 128 KiB on one by one and returns them to the system when they are freed, but each
// freed block raises that limit to its own size, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). After a flood of
// large bodies, their buffers come from the heaps instead, and what lies above them keeps them resident for as
// long as the process runs. A limit that is set stays where it is.
//
// In C, because mallopt is unsafe to call from Rust, where unsafe code stands in the kernels only. The function
// runs before main and before any thread. The build script compiles it for glibc only.
#include <malloc.h>

__attribute__((constructor)) static void tandem_return_large_blocks(void) {
    mallopt(M_MMAP_THRESHOLD, 256 * 1024);
    mallopt(M_TRIM_THRESHOLD, 256 * 1024);
}
