// The core throws WrongType for arguments of a wrong type (Python's TypeError), and
// std::invalid_argument for wrong sizes and values (Python's ValueError).
#pragma once

#include <stdexcept>

namespace rnnfast {

struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace rnnfast
