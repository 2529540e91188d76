// SPDX-License-Identifier: Apache-2.0
// The status codes: the only way in which the library reports an error.
#pragma once

namespace refreekv::inline v0 {

/// The result of a call. After invalid_argument and small_workspace no output was written (one
/// exception: see `prune`) and no cache was touched. After device_error, or any other error that a
/// collective returned, the outputs are undefined.
enum class [[nodiscard]] status {
  ok,
  /// An option or a view is outside its range. `why_invalid` says which: call it with the verb's
  /// arguments, without the backend, the workspace and the ranks. For `prune` leave out the
  /// compaction, too; `why_invalid` of `compact` reports its errors.
  invalid_argument,
  small_workspace,  ///< fewer bytes than `workspace_size` returns
  device_error,     ///< the device refused a launch
};

/// Returns a status in words, for a log line. Never null.
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
