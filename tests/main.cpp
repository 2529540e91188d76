// SPDX-License-Identifier: Apache-2.0
// Catch2's main: version 2.13 puts it here, version 3 has it in a library.
#define CATCH_CONFIG_MAIN
#include "catch.hpp"
