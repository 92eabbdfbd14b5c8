// Told to stop, by a signal; whoever waits, waits no longer.
#pragma once

namespace lola {

// SIGTERM and SIGINT ask this program to leave; the second one ends it.
void stop_at_signals();

// Ask it to leave.
void stop();

bool is_stopping();

// Wait so many seconds; false if it was asked to stop, before or meanwhile.
bool wait_s(double seconds);

} // namespace lola
