// The pair of keys by which a SuperLink knows a node.
#pragma once

#include <memory>
#include <string>

struct evp_pkey_st;

namespace lola {

class NodeKey {
 public:
  // Make a pair, on the curve that Flower's own nodes have (P-384).
  static NodeKey made();

  // Read a private key on an elliptic curve in PEM format; throw Refusal otherwise.
  static NodeKey read(const std::string& path);

  // The public key in PEM format, as Flower compares it.
  const std::string& public_pem() const {
    return public_pem_;
  }

  // Sign with ECDSA over SHA-256; the signature in DER.
  std::string sign(const std::string& text) const;

 private:
  using Pair = std::unique_ptr<evp_pkey_st, void (*)(evp_pkey_st*)>;
  explicit NodeKey(Pair pair);

  Pair pair_;
  std::string public_pem_;
};

// Write bytes in base64.
std::string base64(const std::string& bytes);

} // namespace lola
