// The memory that this process has taken, and may take.
#pragma once

namespace lola {

// Peak of this process's resident memory, in bytes.
double peak_memory_bytes();

// What the machine has left, in bytes, page cache included; infinite if not known.
double available_memory_bytes();

} // namespace lola
