#include "stopping.h"

#include <atomic>
#include <chrono>
#include <csignal>
#include <initializer_list>
#include <thread>

namespace lola {
namespace {

std::atomic<bool> stopping{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal's handler sets it");

constexpr std::chrono::milliseconds kLook{50};

void on_signal(int) {
  stopping = true;
}

} // namespace

void stop_at_signals() {
  struct sigaction action{};
  action.sa_handler = on_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigemptyset(&action.sa_mask);
  for (const int signal : {SIGTERM, SIGINT}) {
    sigaction(signal, &action, nullptr);
  }
  // Who went away is seen where it is written to.
  std::signal(SIGPIPE, SIG_IGN);
}

void stop() {
  stopping = true;
}

bool is_stopping() {
  return stopping;
}

bool wait_s(double seconds) {
  const auto end = std::chrono::steady_clock::now() +
      std::chrono::duration_cast<std::chrono::steady_clock::duration>(
          std::chrono::duration<double>(seconds));
  while (!stopping && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(kLook);
  }
  return !stopping;
}

} // namespace lola
