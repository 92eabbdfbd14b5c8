// What a user can put right: one line that says what is wrong and what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace lola {

class Refusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A device that lacks memory says so; its server gives it another block.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

} // namespace lola
