// Errors of the core: one check macro, one exception type.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pissa {

/// Builds a message from streamable parts. Messages say what is wrong, what was given and what is allowed.
template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// Throws std::invalid_argument (ValueError through pybind11) with the streamed parts when `condition` is false.
/// The parts are evaluated only then.
#define PISSA_CHECK(condition, ...)                               \
  do {                                                            \
    if (!(condition)) [[unlikely]]                                \
      throw std::invalid_argument(::pissa::message(__VA_ARGS__)); \
  } while (false)

}  // namespace pissa
