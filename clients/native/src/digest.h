#pragma once

#include <memory>
#include <string>

struct evp_md_ctx_st;

namespace lola {

// A SHA-256 in the making.
class Sha256 {
 public:
  Sha256();
  void add(const void* data, std::size_t count);
  // The digest in hexadecimal; nothing can be added after it.
  std::string hexadecimal();

 private:
  std::unique_ptr<evp_md_ctx_st, void (*)(evp_md_ctx_st*)> context_;
};

// Return the SHA-256 of a file, in hexadecimal; throw Refusal if it cannot be read.
std::string sha256_of_file(const std::string& path);

// Return the SHA-256 of some bytes, in hexadecimal.
std::string sha256_of(const std::string& bytes);

} // namespace lola
