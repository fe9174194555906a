// Reads and writes bit fields.

#include "command.h"

#include <stdio.h>
#include <string.h>

#include <stdexcept>

namespace epcomm::fabric::devx {

void Message::set(Field field, uint64_t value) {
    if (field.width < 64 && value >> field.width != 0) {
        throw std::runtime_error("ibgda: " + std::to_string(value) + " does not fit into the " +
                                 std::to_string(field.width) + " bits at " +
                                 std::to_string(field.offset) + " of a command");
    }
    for (uint32_t i = 0; i < field.width; ++i) {
        const uint32_t bit = field.offset + field.width - 1 - i;
        const auto mask = uint8_t(0x80 >> bit % 8);
        uint8_t& byte = bytes_.at(bit / 8);
        byte = uint8_t((value >> i & 1) != 0 ? byte | mask : byte & ~mask);
    }
}

uint64_t Message::get(Field field) const {
    uint64_t value = 0;
    for (uint32_t bit = field.offset; bit < field.offset + field.width; ++bit) {
        value = value << 1 | (bytes_.at(bit / 8) >> (7 - bit % 8) & 1);
    }
    return value;
}

std::string describe_failure(int error, const Message& answer) {
    char text[160];
    const auto syndrome = unsigned(answer.get(head::syndrome));
    if (answer.get(head::status) == 0 && syndrome == 0) return strerror(error);
    snprintf(text, sizeof text, "%s (status 0x%x, syndrome 0x%x)", strerror(error),
             unsigned(answer.get(head::status)), syndrome);
    return text;
}

}  // namespace epcomm::fabric::devx
