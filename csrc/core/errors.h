// What is thrown for arguments that do not fit: std::invalid_argument for sizes and values (Python's
// ValueError), and this for types (Python's TypeError).
#pragma once

#include <stdexcept>

namespace rnnfast {

struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace rnnfast
