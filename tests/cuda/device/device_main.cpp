// SPDX-License-Identifier: Apache-2.0
// Runs the tests of memory of the device, with nothing of its own around them.
#include "session.hpp"

int main(int argc, char** argv) { return has_device() ? run_tests(argc, argv) : skipped; }
