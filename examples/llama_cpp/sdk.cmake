# SPDX-License-Identifier: Apache-2.0
# Finds llama.cpp and ggml, which install_sdk.sh builds: targets llama and ggml::ggml, if there.
include_guard(GLOBAL)

file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/install_sdk.sh version REGEX "^version=")
string(REPLACE "version=" "" version "${version}")
set(cache "$ENV{XDG_CACHE_HOME}")
if(cache STREQUAL "")
  set(cache "$ENV{HOME}/.cache")
endif()
set(REFREEKV_LLAMA_SDK "${cache}/refreekv/llama-cpp-python-${version}" CACHE PATH
  "Where llama.cpp and ggml are installed, for the examples that run in them")

set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL TRUE)  # the tests link them, too
find_package(llama CONFIG QUIET PATHS "${REFREEKV_LLAMA_SDK}" NO_DEFAULT_PATH)
unset(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL)
if(NOT TARGET llama)
  message(STATUS "No llama.cpp in ${REFREEKV_LLAMA_SDK}: without the examples in ggml and "
    "llama.cpp (examples/llama_cpp/install_sdk.sh builds it)")
endif()
