// A node's work: it asks for messages, and answers them.
#pragma once

#include "device.h"
#include "fleet.h"

namespace lola {

// Answer messages until the device is asked to stop, or the SuperLink has forgotten the
// node (NotKnown).
void serve(Fleet& fleet, const Node& node, Device& device);

} // namespace lola
