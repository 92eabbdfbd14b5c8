#include "digest.h"

#include <openssl/evp.h>

#include <array>
#include <fstream>
#include <memory>
#include <vector>

#include "refusal.h"

namespace lola {

std::string sha256_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw Refusal(path + " cannot be read; copy the whole directory.");
  }
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(
      EVP_MD_CTX_new(), EVP_MD_CTX_free);
  bool is_fine =
      context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1;
  std::vector<char> chunk(1 << 20);
  while (is_fine && file) {
    file.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    is_fine = EVP_DigestUpdate(
                  context.get(),
                  chunk.data(),
                  static_cast<std::size_t>(file.gcount())) == 1;
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  if (!is_fine || file.bad() ||
      EVP_DigestFinal_ex(context.get(), digest.data(), &length) != 1) {
    throw Refusal(path + " cannot be read to its end; copy it anew.");
  }
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned int i = 0; i < length; ++i) {
    text += kDigits[digest[i] >> 4];
    text += kDigits[digest[i] & 15];
  }
  return text;
}

} // namespace lola
