// SPDX-License-Identifier: Apache-2.0
// How a call ended: the library's only way to report an error.
#pragma once

namespace refreekv::inline v0 {

/// After invalid_argument and small_workspace no output was written (but see prune) and no cache
/// was touched; after device_error, or whatever else a reduction returned, outputs are undefined.
enum class [[nodiscard]] status {
  ok,
  /// An option or a view is outside its range: `why_invalid` names it, given the verb's arguments
  /// without the backend, the workspace and the reduction, and of `prune` without the compaction:
  /// what is wrong with that, the verb `compact` would say.
  invalid_argument,
  small_workspace,  ///< fewer bytes than `workspace_size` asks for
  device_error,     ///< the device refused a launch
};

/// A status in words, for a log line. Never null.
[[nodiscard]] constexpr const char* to_string(status s) noexcept {
  switch (s) {
    case status::ok: return "ok";
    case status::invalid_argument: return "invalid argument";
    case status::small_workspace: return "workspace too small";
    case status::device_error: return "device error";
    default: return "unknown status";
  }
}

}  // namespace refreekv::inline v0
