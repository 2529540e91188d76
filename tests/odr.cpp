// SPDX-License-Identifier: Apache-2.0
// The consumer's translation unit once more, linked with the first: every function must be inline.
#define main again
#include "package/consumer/main.cpp"
