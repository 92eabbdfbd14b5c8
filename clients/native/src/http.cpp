#include "http.h"

#include <curl/curl.h>

#include <algorithm>
#include <cctype>
#include <fstream>

#include "refusal.h"
#include "stopping.h"

namespace lola {
namespace {

constexpr long kConnect_s = 30;
// As Flower's own nodes: who sends nothing for so long has gone.
constexpr long kSilent_s = 30;
constexpr char kWarning[] = "flwr-version-incompatibility-message:";
constexpr std::size_t kLargestHeader = 1 << 14;

struct Reading {
  Response response{};
  std::size_t most_bytes = 0;
  bool is_too_long = false;
};

std::size_t on_body(char* data, std::size_t, std::size_t count, void* place) {
  auto& reading = *static_cast<Reading*>(place);
  if (count > reading.most_bytes - reading.response.body.size()) {
    reading.is_too_long = true;
    return 0; // libcurl ends the transfer
  }
  reading.response.body.append(data, count);
  return count;
}

std::size_t on_header(char* data, std::size_t, std::size_t count, void* place) {
  auto& reading = *static_cast<Reading*>(place);
  const std::string line(data, std::min(count, kLargestHeader));
  const std::size_t length = sizeof(kWarning) - 1;
  const bool is_warning = line.size() > length &&
      std::equal(line.begin(), line.begin() + length, kWarning, [](char one, char other) {
        return std::tolower(static_cast<unsigned char>(one)) == other;
      });
  if (is_warning) {
    reading.response.warning = line.substr(length);
  }
  return count;
}

int on_progress(void*, curl_off_t, curl_off_t, curl_off_t, curl_off_t) {
  return is_stopping() ? 1 : 0;
}

// Return whether trying again cannot help: what was given is wrong.
bool is_lasting(CURLcode code) {
  return code == CURLE_PEER_FAILED_VERIFICATION || code == CURLE_SSL_CACERT_BADFILE ||
      code == CURLE_URL_MALFORMAT || code == CURLE_UNSUPPORTED_PROTOCOL ||
      code == CURLE_SSL_CERTPROBLEM;
}

} // namespace

Http::Http(const std::string& address, bool is_secure, const std::string& root_certificates)
    : base_((is_secure ? "https://" : "http://") + address),
      root_certificates_(root_certificates),
      curl_(curl_easy_init(), curl_easy_cleanup) {
  if (!curl_) {
    throw std::runtime_error("libcurl cannot be used.");
  }
  if (!root_certificates.empty() && !std::ifstream(root_certificates)) {
    throw Refusal(root_certificates + " cannot be read; name the root certificates.");
  }
}

Http::~Http() = default;

Response Http::post(
    const std::string& path,
    const std::string& body,
    const std::vector<std::string>& headers,
    std::size_t most_bytes,
    long timeout_s) {
  CURL* curl = curl_.get();
  curl_easy_reset(curl); // the connection is kept
  Reading reading;
  reading.most_bytes = most_bytes;
  std::unique_ptr<curl_slist, decltype(&curl_slist_free_all)> list(
      nullptr, curl_slist_free_all);
  for (const std::string& header : headers) {
    curl_slist* longer = curl_slist_append(list.get(), header.c_str());
    if (longer == nullptr) {
      throw std::bad_alloc();
    }
    (void)list.release();
    list.reset(longer);
  }
  char reason[CURL_ERROR_SIZE] = "";
  const std::string url = base_ + path;
  const auto set = [&](CURLoption option, auto value) {
    if (curl_easy_setopt(curl, option, value) != CURLE_OK) {
      throw std::runtime_error("libcurl does not know an option.");
    }
  };
  set(CURLOPT_URL, url.c_str());
  set(CURLOPT_PROTOCOLS_STR, "http,https");
  set(CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
  set(CURLOPT_POST, 1L);
  set(CURLOPT_POSTFIELDS, body.data());
  set(CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(body.size()));
  set(CURLOPT_HTTPHEADER, list.get());
  set(CURLOPT_WRITEFUNCTION, on_body);
  set(CURLOPT_WRITEDATA, &reading);
  set(CURLOPT_HEADERFUNCTION, on_header);
  set(CURLOPT_HEADERDATA, &reading);
  set(CURLOPT_ERRORBUFFER, reason);
  set(CURLOPT_NOSIGNAL, 1L);
  set(CURLOPT_CONNECTTIMEOUT, kConnect_s);
  set(CURLOPT_LOW_SPEED_LIMIT, 1L);
  set(CURLOPT_LOW_SPEED_TIME, kSilent_s);
  set(CURLOPT_TIMEOUT, timeout_s);
  if (heeds_stop_) {
    set(CURLOPT_NOPROGRESS, 0L);
    set(CURLOPT_XFERINFOFUNCTION, on_progress);
  }
  if (!root_certificates_.empty()) {
    set(CURLOPT_CAINFO, root_certificates_.c_str());
  }
  const CURLcode code = curl_easy_perform(curl);
  if (code != CURLE_OK) {
    const std::string said = reason[0] ? reason : curl_easy_strerror(code);
    if (reading.is_too_long) {
      throw std::runtime_error(
          path + " answers with more than " + std::to_string(most_bytes) + " bytes.");
    }
    if (is_lasting(code)) {
      throw Refusal(base_ + " cannot be used: " + said + ".");
    }
    throw Unreachable(base_ + " does not answer: " + said);
  }
  curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &reading.response.status);
  return std::move(reading.response);
}

} // namespace lola
