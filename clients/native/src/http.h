// Requests over HTTP, of which no more is read than was announced.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace lola {

// The server could not be asked, or did not answer as it should; trying again may help.
class Unreachable : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Response {
  long status;
  std::string body;
  std::string warning; // what the server says of this client's version
};

class Http {
 public:
  // `address` is HOST:PORT. With certificates it is https, of which these are the
  // roots; "" for the system's own. Throw Refusal if that cannot be.
  Http(const std::string& address, bool is_secure, const std::string& root_certificates);
  ~Http();

  // Post a body; read no more than `most_bytes` of the answer.
  Response post(
      const std::string& path,
      const std::string& body,
      const std::vector<std::string>& headers,
      std::size_t most_bytes,
      long timeout_s = 0);

  // Answer nothing more to whom is asked to stop (default), or finish before that.
  void finish_though_stopping() {
    heeds_stop_ = false;
  }

 private:
  std::string base_;
  std::string root_certificates_;
  bool heeds_stop_ = true;
  std::unique_ptr<void, void (*)(void*)> curl_;
};

} // namespace lola
