#include "node_key.h"

#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <fstream>
#include <sstream>
#include <vector>

#include "refusal.h"

namespace lola {
namespace {

using Memory = std::unique_ptr<BIO, decltype(&BIO_free)>;

void require(bool is_fine, const char* what) {
  if (!is_fine) {
    throw std::runtime_error(std::string("OpenSSL cannot ") + what + ".");
  }
}

} // namespace

NodeKey::NodeKey(Pair pair) : pair_(std::move(pair)) {
  const Memory memory(BIO_new(BIO_s_mem()), BIO_free);
  require(memory && PEM_write_bio_PUBKEY(memory.get(), pair_.get()) == 1, "write a key");
  char* data = nullptr;
  const long length = BIO_get_mem_data(memory.get(), &data);
  require(length > 0, "write a key");
  public_pem_.assign(data, static_cast<std::size_t>(length));
}

NodeKey NodeKey::made() {
  Pair pair(EVP_EC_gen("P-384"), EVP_PKEY_free);
  require(pair != nullptr, "make a key");
  return NodeKey(std::move(pair));
}

NodeKey NodeKey::read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    throw Refusal(path + " cannot be read; name the node's private key.");
  }
  const std::string pem = text.str();
  if (pem.find("BEGIN OPENSSH") != std::string::npos) {
    throw Refusal(
        path + " is in OpenSSH's own format; write a copy of it as PEM: ssh-keygen -p "
        "-m pkcs8 -N '' -f COPY.");
  }
  const Memory memory(
      BIO_new_mem_buf(pem.data(), static_cast<int>(std::min(pem.size(), std::size_t{1} << 20))),
      BIO_free);
  Pair pair(
      memory ? PEM_read_bio_PrivateKey(memory.get(), nullptr, nullptr, nullptr) : nullptr,
      EVP_PKEY_free);
  if (!pair || EVP_PKEY_get_base_id(pair.get()) != EVP_PKEY_EC) {
    throw Refusal(
        path + " is no private key on an elliptic curve in PEM format without a password.");
  }
  return NodeKey(std::move(pair));
}

std::string NodeKey::sign(const std::string& text) const {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(
      EVP_MD_CTX_new(), EVP_MD_CTX_free);
  const auto* data = reinterpret_cast<const unsigned char*>(text.data());
  std::size_t length = 0;
  require(
      context &&
          EVP_DigestSignInit(context.get(), nullptr, EVP_sha256(), nullptr, pair_.get()) == 1 &&
          EVP_DigestSign(context.get(), nullptr, &length, data, text.size()) == 1,
      "sign");
  std::string signature(length, '\0');
  require(
      EVP_DigestSign(
          context.get(),
          reinterpret_cast<unsigned char*>(signature.data()),
          &length,
          data,
          text.size()) == 1,
      "sign");
  signature.resize(length);
  return signature;
}

std::string base64(const std::string& bytes) {
  require(bytes.size() < (1 << 20), "write so much in base64");
  std::string text(4 * ((bytes.size() + 2) / 3) + 1, '\0');
  const int length = EVP_EncodeBlock(
      reinterpret_cast<unsigned char*>(text.data()),
      reinterpret_cast<const unsigned char*>(bytes.data()),
      static_cast<int>(bytes.size()));
  text.resize(static_cast<std::size_t>(length));
  return text;
}

} // namespace lola
