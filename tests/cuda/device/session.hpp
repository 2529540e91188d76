// SPDX-License-Identifier: Apache-2.0
// What the programs that need a device have in common.
#pragma once

/// What a program returns, and CTest takes for a skipped test, where there is no device.
inline constexpr int skipped = 77;

/// Whether there is a device; prints it where there is none.
bool has_device();

/// Runs the tests that the command line names. 0, or 1 where one fails: their number may be
/// `skipped`.
int run_tests(int argc, char** argv);
