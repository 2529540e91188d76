// SPDX-License-Identifier: Apache-2.0
// Catch2, version 3 or 2.
#pragma once

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
using Catch::Approx;
using Catch::Matchers::Message;
#else
#include <catch2/catch.hpp>
using Catch::Matchers::Message;
#endif
