#include "digest.h"

#include <openssl/evp.h>

#include <array>
#include <fstream>
#include <vector>

#include "refusal.h"

namespace lola {
namespace {

void require(bool is_fine) {
  if (!is_fine) {
    throw std::runtime_error("OpenSSL cannot compute a SHA-256.");
  }
}

} // namespace

Sha256::Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
  require(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
}

void Sha256::add(const void* data, std::size_t count) {
  require(EVP_DigestUpdate(context_.get(), data, count) == 1);
}

std::string Sha256::hexadecimal() {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  require(EVP_DigestFinal_ex(context_.get(), digest.data(), &length) == 1);
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned int i = 0; i < length; ++i) {
    text += kDigits[digest[i] >> 4];
    text += kDigits[digest[i] & 15];
  }
  return text;
}

std::string sha256_of_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw Refusal(path + " cannot be read; copy the whole directory.");
  }
  Sha256 digest;
  std::vector<char> chunk(1 << 20);
  while (file) {
    file.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    digest.add(chunk.data(), static_cast<std::size_t>(file.gcount()));
  }
  if (file.bad()) {
    throw Refusal(path + " cannot be read to its end; copy it anew.");
  }
  return digest.hexadecimal();
}

std::string sha256_of(const std::string& bytes) {
  Sha256 digest;
  digest.add(bytes.data(), bytes.size());
  return digest.hexadecimal();
}

} // namespace lola
