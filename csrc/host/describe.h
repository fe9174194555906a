// Descriptions of structures for Python: one entry per field, one of no bytes at the end.
#pragma once

#include <stddef.h>

#include <type_traits>

#include "epcomm.h"

namespace epcomm {

template <typename Item>
constexpr char kind_of() {
    if (std::is_floating_point<Item>::value) return 'f';
    return std::is_integral<Item>::value && std::is_signed<Item>::value ? 'i' : 'u';
}

/// Text is one item; nested structures are that many bytes, pointers unsigned integers.
template <typename Type>
constexpr epcomm_field describe(const char* structure, const char* field, size_t offset) {
    using Item = std::remove_extent_t<Type>;
    if (std::is_same<Item, char>::value) {
        return {structure, field, uint32_t(offset), uint32_t(sizeof(Type)), 1, 'S'};
    }
    const bool nested = std::is_class<Item>::value || std::is_array<Item>::value;
    return {structure,
            field,
            uint32_t(offset),
            nested ? 1u : uint32_t(sizeof(Item)),
            nested ? uint32_t(sizeof(Type)) : uint32_t(sizeof(Type) / sizeof(Item)),
            nested ? 'u' : kind_of<Item>()};
}

}  // namespace epcomm
