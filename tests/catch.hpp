// SPDX-License-Identifier: Apache-2.0
// Catch2, version 2.13 or 3.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;  // global in Catch2 2.13
#else
#include <catch2/catch.hpp>
#endif
using Catch::Matchers::Message;
