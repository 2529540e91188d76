// SPDX-License-Identifier: Apache-2.0
// What the operating system says of this process's memory.
#pragma once

#include <cstddef>

namespace smollm2 {

std::size_t resident_bytes();
std::size_t peak_resident_bytes();

}  // namespace smollm2
