// SPDX-License-Identifier: Apache-2.0
// The library's version; the build reads it from here.
#pragma once

#define REFREEKV_VERSION_MAJOR 0
#define REFREEKV_VERSION_MINOR 2
#define REFREEKV_VERSION_PATCH 0
