#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mmrm {

// Asks for huge pages behind a large output that nothing has touched yet: the page faults of 4 KiB pages cost several
// times what writing it does. A hint; torch does the same where THP_MEM_ALLOC_ENABLE=1.
inline void use_huge_pages([[maybe_unused]] void* output, [[maybe_unused]] int64_t num_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(output);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + num_bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mmrm
