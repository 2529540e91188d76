// SPDX-License-Identifier: Apache-2.0
#include "resident_memory.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <fstream>

namespace smollm2 {

std::size_t resident_bytes() {
  std::size_t all_pages = 0, resident_pages = 0;
  std::ifstream("/proc/self/statm") >> all_pages >> resident_pages;
  return resident_pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

std::size_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

}  // namespace smollm2
